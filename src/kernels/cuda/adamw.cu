// AdamW of many tensors in one launch: gradient, moments, master and the low-precision copy in one pass.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ AdamW p) {
  if (*p.skip != 0.f) return;
  int tensor = 0;
  while (static_cast<int>(blockIdx.x) >= p.first_block[tensor + 1]) ++tensor;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) - p.first_block[tensor]) * kAdamWBlock;
  const int64_t end = min(first + kAdamWBlock, p.elements[tensor]);
  const float step = *p.step, inverse_scale = 1.f / *p.grad_scale;
  const float correction1 = 1.f - powf(p.beta1, step), correction2 = sqrtf(1.f - powf(p.beta2, step));
  const float rate = p.lr / correction1, decay = 1.f - p.lr * p.weight_decay;
  auto *master = p.master[tensor], *exp_avg = p.exp_avg[tensor], *exp_avg_sq = p.exp_avg_sq[tensor];
  const auto* grad = p.grad[tensor];
  auto* parameter = static_cast<T*>(p.parameter[tensor]);
  auto update = [&](float& w, float g, float& m, float& v) {
    g *= inverse_scale;
    m += (1.f - p.beta1) * (g - m);
    v = p.beta2 * v + (1.f - p.beta2) * g * g;
    w = w * decay - rate * m / (sqrtf(v) / correction2 + p.epsilon);
  };
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

}  // namespace

void adamw(const AdamW& p, Type parameter_type, Stream stream) {
  with_type(parameter_type, [&](auto zero) {
    adamw_kernel<decltype(zero)><<<p.first_block[p.count], kThreads, 0, native(stream)>>>(p);
  });
  check_launch("adamw");
}

}  // namespace mcore_bridge::cuda
