// FP8 products by cuBLASLt, which (unlike libtorch's _scaled_mm over it) also adds onto what is there: a LoRA product,
// an fp32 main gradient.
#include <cublasLt.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "fp8.h"
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

#define MCB_HAS_BLOCK_SCALING (CUBLAS_VERSION >= 120900)

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string("fp8_matmul: ") + what + ": " + cublasLtGetStatusString(status));
}

cudaDataType_t native_type(Type type) {
  return type == Type::kFloat ? CUDA_R_32F : type == Type::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
}

/// Destroys what cuBLASLt made.
template <class T, cublasStatus_t (*kDestroy)(T)>
struct Owned {
  T value = nullptr;
  Owned() = default;
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (value) kDestroy(value);
  }
};
using Description = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

using Key = std::tuple<int, int64_t, int64_t, int64_t, int, int, int, int, int, bool>;

/// Handles by device, algorithms by problem.
struct Plans {
  std::mutex mutex;
  std::map<int, cublasLtHandle_t> handles;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms;
};
Plans& plans() {
  static auto* instance = new Plans;  // lives on: cuBLAS may be gone when statics go
  return *instance;
}

template <class V>
void set(const Description& description, cublasLtMatmulDescAttributes_t what, const V& value) {
  check(cublasLtMatmulDescSetAttribute(description.value, what, &value, sizeof(value)), "attribute");
}

void set_scale(const Description& description, bool first, Fp8Scaling scaling, const float* scale) {
  set(description, first ? CUBLASLT_MATMUL_DESC_A_SCALE_POINTER : CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, scale);
#if MCB_HAS_BLOCK_SCALING
  const int32_t mode = scaling == Fp8Scaling::kTensor ? CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F
                       : scaling == Fp8Scaling::kRows ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F
                                                      : CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
  set(description, first ? CUBLASLT_MATMUL_DESC_A_SCALE_MODE : CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode);
#endif
}

}  // namespace

bool fp8_has_blocks() { return MCB_HAS_BLOCK_SCALING; }

int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    throw std::runtime_error("compute_capability: no CUDA device");
  return 10 * major + minor;
}

void fp8_matmul(const Fp8Matmul& p, Type type, Stream stream) {
  // cuBLAS counts columns first: to^T [n, m] = b a^T, so its first operand is our b.
  Description description;
  check(cublasLtMatmulDescCreate(&description.value, CUBLAS_COMPUTE_32F, CUDA_R_32F), "description");
  set(description, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  set(description, CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  set_scale(description, true, p.scaling_b, p.scale_b);
  set_scale(description, false, p.scaling_a, p.scale_a);
  Layout first, second, to;
  auto layout = [](Layout& layout, cudaDataType_t of, int64_t rows, int64_t columns) {
    check(cublasLtMatrixLayoutCreate(&layout.value, of, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), rows),
          "layout");
  };
  layout(first, p.e5m2_b ? CUDA_R_8F_E5M2 : CUDA_R_8F_E4M3, p.k, p.n);
  layout(second, p.e5m2_a ? CUDA_R_8F_E5M2 : CUDA_R_8F_E4M3, p.k, p.m);
  layout(to, native_type(type), p.n, p.m);

  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("fp8_matmul: no CUDA device");
  const Key key{device, p.m, p.n, p.k, static_cast<int>(type), static_cast<int>(p.scaling_a),
                static_cast<int>(p.scaling_b), p.e5m2_a, p.e5m2_b, p.accumulate};
  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulAlgo_t algorithm;
  {
    auto& known = plans();
    const std::lock_guard<std::mutex> lock(known.mutex);
    auto& own = known.handles[device];
    if (!own) check(cublasLtCreate(&own), "handle");
    handle = own;
    auto found = known.algorithms.find(key);
    if (found == known.algorithms.end()) {
      Preference preference;
      check(cublasLtMatmulPreferenceCreate(&preference.value), "preference");
      const auto most = static_cast<size_t>(p.workspace_bytes);
      check(cublasLtMatmulPreferenceSetAttribute(preference.value, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most,
                                                 sizeof(most)),
            "preference");
      cublasLtMatmulHeuristicResult_t result{};
      int count = 0;
      const auto status = cublasLtMatmulAlgoGetHeuristic(handle, description.value, first.value, second.value, to.value,
                                                         to.value, preference.value, 1, &result, &count);
      if (status != CUBLAS_STATUS_SUCCESS || count == 0)
        throw std::runtime_error("fp8_matmul: cuBLASLt has no algorithm for [" + std::to_string(p.m) + ", " +
                                 std::to_string(p.k) + "] x [" + std::to_string(p.n) + ", " + std::to_string(p.k) +
                                 "]^T with scalings " + std::to_string(static_cast<int>(p.scaling_a)) + ", " +
                                 std::to_string(static_cast<int>(p.scaling_b)) + " on compute capability " +
                                 std::to_string(compute_capability()));
      found = known.algorithms.emplace(key, result.algo).first;
    }
    algorithm = found->second;
  }
  const float alpha = 1.f, beta = p.accumulate ? 1.f : 0.f;
  check(cublasLtMatmul(handle, description.value, &alpha, p.b, first.value, p.a, second.value, &beta, p.to, to.value,
                       p.to, to.value, &algorithm, p.workspace, static_cast<size_t>(p.workspace_bytes),
                       native(stream)),
        "product");
}

}  // namespace mcore_bridge::cuda
