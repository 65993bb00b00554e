// AdamW of many tensors in one launch: gradient, moments, master and the low-precision copy in one pass.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kThreads = 256;

/// The part of a tensor that is this block's.
struct Share {
  int tensor = 0;
  int64_t first, end;
  __device__ explicit Share(const AdamW& p) {
    while (static_cast<int>(blockIdx.x) >= p.first_block[tensor + 1]) ++tensor;
    first = (static_cast<int64_t>(blockIdx.x) - p.first_block[tensor]) * kAdamWBlock;
    end = min(first + kAdamWBlock, p.elements[tensor]);
  }
};

struct Update {
  float beta1, beta2, epsilon, inverse_scale, correction2, rate, decay;
  __device__ explicit Update(const AdamW& p)
      : beta1(p.beta1), beta2(p.beta2), epsilon(p.epsilon), inverse_scale(1.f / *p.grad_scale) {
    const float step = *p.step, correction1 = 1.f - powf(beta1, step);
    correction2 = sqrtf(1.f - powf(beta2, step));
    rate = p.lr / correction1;
    decay = 1.f - p.lr * p.weight_decay;
  }
  __device__ __forceinline__ void operator()(float& w, float g, float& m, float& v) const {
    g *= inverse_scale;
    m += (1.f - beta1) * (g - m);
    v = beta2 * v + (1.f - beta2) * g * g;
    w = w * decay - rate * m / (sqrtf(v) / correction2 + epsilon);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ AdamW p) {
  if (*p.skip != 0.f) return;
  const Share share(p);
  const Update update(p);
  const auto first = share.first, end = share.end;
  auto *master = static_cast<float*>(p.master[share.tensor]), *exp_avg = static_cast<float*>(p.exp_avg[share.tensor]),
       *exp_avg_sq = static_cast<float*>(p.exp_avg_sq[share.tensor]);
  const auto* grad = static_cast<const float*>(p.grad[share.tensor]);
  auto* parameter = static_cast<T*>(p.parameter[share.tensor]);
  const bool aligned = ((reinterpret_cast<uintptr_t>(master) | reinterpret_cast<uintptr_t>(exp_avg) |
                         reinterpret_cast<uintptr_t>(exp_avg_sq) | reinterpret_cast<uintptr_t>(grad)) %
                            16 ==
                        0) &&
                       reinterpret_cast<uintptr_t>(parameter) % (4 * sizeof(T)) == 0;
  if (!aligned) {
    for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
      update(master[i], grad[i], exp_avg[i], exp_avg_sq[i]);
      if (parameter) parameter[i] = static_cast<T>(master[i]);
    }
    return;
  }
  for (int64_t i = first + threadIdx.x * 4; i < end; i += kThreads * 4) {
    if (i + 4 <= end) {
      float w[4], g[4], m[4], v[4];
      load<float, 4>(master + i, w);
      load<float, 4>(grad + i, g);
      load<float, 4>(exp_avg + i, m);
      load<float, 4>(exp_avg_sq + i, v);
#pragma unroll
      for (int j = 0; j < 4; ++j) update(w[j], g[j], m[j], v[j]);
      store<float, 4>(master + i, w);
      store<float, 4>(exp_avg + i, m);
      store<float, 4>(exp_avg_sq + i, v);
      if (parameter) store<T, 4>(parameter + i, w);
    } else {
      for (int64_t j = i; j < end; ++j) {
        update(master[j], grad[j], exp_avg[j], exp_avg_sq[j]);
        if (parameter) parameter[j] = static_cast<T>(master[j]);
      }
    }
  }
}

constexpr int kWide = 8;

/// Eight elements from `at` on, of which `count` are there.
template <class T>
__device__ __forceinline__ void read_as(const void* from, int64_t at, int64_t count, float (&to)[kWide]) {
  constexpr int kPart = 16 / sizeof(T);
  const auto* values = static_cast<const T*>(from) + at;
  if (count >= kWide && reinterpret_cast<uintptr_t>(values) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kWide; i += kPart) {
      float part[kPart];
      load<T, kPart>(values + i, part);
#pragma unroll
      for (int j = 0; j < kPart; ++j) to[i + j] = part[j];
    }
  } else {
    for (int i = 0; i < kWide; ++i) to[i] = i < count ? static_cast<float>(values[i]) : 0.f;
  }
}

template <class T>
__device__ __forceinline__ void write_as(void* where, int64_t at, int64_t count, const float (&from)[kWide]) {
  constexpr int kPart = 16 / sizeof(T);
  auto* values = static_cast<T*>(where) + at;
  if (count >= kWide && reinterpret_cast<uintptr_t>(values) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kWide; i += kPart) {
      float part[kPart];
#pragma unroll
      for (int j = 0; j < kPart; ++j) part[j] = from[i + j];
      store<T, kPart>(values + i, part);
    }
  } else {
    for (int i = 0; i < kWide && i < count; ++i) values[i] = static_cast<T>(from[i]);
  }
}

__device__ __forceinline__ void read(const void* from, Type type, int64_t at, int64_t count, float (&to)[kWide]) {
  if (type == Type::kFloat) return read_as<float>(from, at, count, to);
  if (type == Type::kBFloat16) return read_as<__nv_bfloat16>(from, at, count, to);
  read_as<__half>(from, at, count, to);
}

__device__ __forceinline__ void write(void* where, Type type, int64_t at, int64_t count, const float (&from)[kWide]) {
  if (type == Type::kFloat) return write_as<float>(where, at, count, from);
  if (type == Type::kBFloat16) return write_as<__nv_bfloat16>(where, at, count, from);
  write_as<__half>(where, at, count, from);
}

/// Any precision of any of them; the branches are alike for the whole launch.
__global__ void __launch_bounds__(kThreads) adamw_mixed_kernel(const __grid_constant__ AdamW p, AdamWTypes types) {
  if (*p.skip != 0.f) return;
  const Share share(p);
  const Update update(p);
  const auto tensor = share.tensor;
  for (int64_t i = share.first + threadIdx.x * kWide; i < share.end; i += kThreads * kWide) {
    const auto count = share.end - i;
    float w[kWide], g[kWide], m[kWide], v[kWide];
    read(p.master[tensor], types.master, i, count, w);
    read(p.grad[tensor], types.grad, i, count, g);
    read(p.exp_avg[tensor], types.exp_avg, i, count, m);
    read(p.exp_avg_sq[tensor], types.exp_avg_sq, i, count, v);
#pragma unroll
    for (int j = 0; j < kWide; ++j) update(w[j], g[j], m[j], v[j]);
    write(p.master[tensor], types.master, i, count, w);
    write(p.exp_avg[tensor], types.exp_avg, i, count, m);
    write(p.exp_avg_sq[tensor], types.exp_avg_sq, i, count, v);
    if (p.parameter[tensor]) write(p.parameter[tensor], types.parameter, i, count, w);
  }
}

}  // namespace

void adamw(const AdamW& p, const AdamWTypes& types, Stream stream) {
  const auto blocks = p.first_block[p.count];
  if (types == AdamWTypes{.parameter = types.parameter}) {
    with_type(types.parameter, [&](auto zero) {
      adamw_kernel<decltype(zero)><<<blocks, kThreads, 0, native(stream)>>>(p);
    });
  } else {
    adamw_mixed_kernel<<<blocks, kThreads, 0, native(stream)>>>(p, types);
  }
  check_launch("adamw");
}

}  // namespace mcore_bridge::cuda
