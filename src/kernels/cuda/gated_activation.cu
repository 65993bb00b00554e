// act(gate) * up, 16 bytes of each a thread.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr float kSqrtHalf = 0.70710678118654752f, kInvSqrt2Pi = 0.39894228040143268f,
                kSqrt2OverPi = 0.79788456080286536f;

/// act(x), and its derivative.
template <int kActivation>
__device__ __forceinline__ void activate(float x, float& value, float& slope) {
  if constexpr (kActivation == 0) {
    const float sigmoid = 1.f / (1.f + __expf(-x));
    value = x * sigmoid;
    slope = sigmoid * (1.f + x * (1.f - sigmoid));
  } else if constexpr (kActivation == 1) {
    const float cdf = 0.5f * (1.f + erff(x * kSqrtHalf));
    value = x * cdf;
    slope = cdf + x * kInvSqrt2Pi * expf(-0.5f * x * x);
  } else {
    const float inner = kSqrt2OverPi * (x + 0.044715f * x * x * x);
    const float t = tanhf(inner);
    value = 0.5f * x * (1.f + t);
    slope = 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * kSqrt2OverPi * (1.f + 3.f * 0.044715f * x * x);
  }
}

template <class T, int kActivation, bool kBackward>
__global__ void __launch_bounds__(256) gated_kernel(Gated p) {
  constexpr int N = 16 / sizeof(T);
  const int64_t packs = p.width / N, i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= p.rows * packs) return;
  const int64_t row = i / packs, pack = i % packs;
  const int64_t gate_at = row * 2 * p.width + pack * N, up_at = gate_at + p.width;
  float gate[N], up[N], out[N];
  load<T, N>(static_cast<const T*>(p.x) + gate_at, gate);
  load<T, N>(static_cast<const T*>(p.x) + up_at, up);
  if constexpr (kBackward) {
    float grad[N];
    load<T, N>(static_cast<const T*>(p.grad) + row * p.width + pack * N, grad);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float value, slope;
      activate<kActivation>(gate[j], value, slope);
      out[j] = value * up[j];
      gate[j] = grad[j] * up[j] * slope;
      up[j] = grad[j] * value;
    }
    store<T, N>(static_cast<T*>(p.grad_x) + gate_at, gate);
    store<T, N>(static_cast<T*>(p.grad_x) + up_at, up);
    if (p.out) store<T, N>(static_cast<T*>(p.out) + row * p.out_stride + pack * N, out);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float value, slope;
      activate<kActivation>(gate[j], value, slope);
      out[j] = value * up[j];
    }
    store<T, N>(static_cast<T*>(p.out) + row * p.out_stride + pack * N, out);
  }
}

template <bool kBackward>
void launch(const Gated& p, Type type, Stream stream) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t packs = p.rows * p.width / (16 / sizeof(T));
    const auto blocks = static_cast<unsigned>((packs + 255) / 256);
    if (p.activation == 0) {
      gated_kernel<T, 0, kBackward><<<blocks, 256, 0, native(stream)>>>(p);
    } else if (p.activation == 1) {
      gated_kernel<T, 1, kBackward><<<blocks, 256, 0, native(stream)>>>(p);
    } else {
      gated_kernel<T, 2, kBackward><<<blocks, 256, 0, native(stream)>>>(p);
    }
  });
  check_launch("gated_activation");
}

}  // namespace

void gated_forward(const Gated& p, Type type, Stream stream) { launch<false>(p, type, stream); }
void gated_backward(const Gated& p, Type type, Stream stream) { launch<true>(p, type, stream); }

}  // namespace mcore_bridge::cuda
