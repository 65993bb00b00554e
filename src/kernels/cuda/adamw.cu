// AdamW of many tensors in one launch: gradient, moments, master and the low-precision copy in one pass.
#include <algorithm>

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
  float beta1, beta2, epsilon, inverse_scale, correction2, rate, decay;  // correction2: its reciprocal
  __device__ explicit Update(const AdamW& p)
      : beta1(p.beta1), beta2(p.beta2), epsilon(p.epsilon), inverse_scale(1.f / *p.grad_scale) {
    const float step = *p.step, correction1 = 1.f - powf(beta1, step);
    correction2 = rsqrtf(1.f - powf(beta2, step));
    rate = p.lr / correction1;
    decay = 1.f - p.lr * p.weight_decay;
  }
  __device__ __forceinline__ void operator()(float& w, float g, float& m, float& v) const {
    g *= inverse_scale;
    m += (1.f - beta1) * (g - m);
    v = beta2 * v + (1.f - beta2) * g * g;
    // Without the exact square root and division, which would take longer than half-precision states take to arrive.
    const float root = v * rsqrtf(fmaxf(v, 1e-38f));
    w = w * decay - __fdividef(rate * m, root * correction2 + epsilon);
  }
};

/// Elements of one access: 16 bytes of the widest type.
template <class... T>
constexpr int kWide = 16 / std::max({sizeof(T)...});

template <class Master, class Grad, class First, class Second, class Low>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ AdamW p) {
  constexpr int N = kWide<Master, Grad, First, Second>;
  if (*p.skip != 0.f) return;
  const Share share(p);
  const Update update(p);
  auto* master = static_cast<Master*>(p.master[share.tensor]);
  const auto* grad = static_cast<const Grad*>(p.grad[share.tensor]);
  auto* exp_avg = static_cast<First*>(p.exp_avg[share.tensor]);
  auto* exp_avg_sq = static_cast<Second*>(p.exp_avg_sq[share.tensor]);
  auto* parameter = static_cast<Low*>(p.parameter[share.tensor]);
  auto one = [&](int64_t i) {
    float w = master[i], g = grad[i], m = exp_avg[i], v = exp_avg_sq[i];
    update(w, g, m, v);
    master[i] = static_cast<Master>(w);
    exp_avg[i] = static_cast<First>(m);
    exp_avg_sq[i] = static_cast<Second>(v);
    if (parameter) parameter[i] = static_cast<Low>(w);
  };
  const auto aligned = [](const auto* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % (N * sizeof(*pointer)) == 0;
  };
  if (!(aligned(master) && aligned(grad) && aligned(exp_avg) && aligned(exp_avg_sq) && aligned(parameter))) {
    for (int64_t i = share.first + threadIdx.x; i < share.end; i += kThreads) one(i);
    return;
  }
#pragma unroll 2
  for (int64_t i = share.first + threadIdx.x * N; i < share.end; i += kThreads * N) {
    if (i + N > share.end) {
      for (; i < share.end; ++i) one(i);
      return;
    }
    float w[N], g[N], m[N], v[N];
    load<Master, N>(master + i, w);
    load<Grad, N>(grad + i, g);
    load<First, N>(exp_avg + i, m);
    load<Second, N>(exp_avg_sq + i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) update(w[j], g[j], m[j], v[j]);
    store<Master, N>(master + i, w);
    store<First, N>(exp_avg + i, m);
    store<Second, N>(exp_avg_sq + i, v);
    if (parameter) store<Low, N>(parameter + i, w);
  }
}

}  // namespace

void adamw(const AdamW& p, const AdamWTypes& types, Stream stream) {
  const auto launch = [&](auto half) {
    using Half = decltype(half);
    const auto either = [](Type type, auto f) { type == Type::kFloat ? f(float{}) : f(Half{}); };
    either(types.master, [&](auto master) {
      either(types.grad, [&](auto grad) {
        either(types.exp_avg, [&](auto first) {
          either(types.exp_avg_sq, [&](auto second) {
            either(types.parameter, [&](auto low) {
              adamw_kernel<decltype(master), decltype(grad), decltype(first), decltype(second), decltype(low)>
                  <<<p.first_block[p.count], kThreads, 0, native(stream)>>>(p);
            });
          });
        });
      });
    });
  };
  types.has(Type::kHalf) ? launch(__half{}) : launch(__nv_bfloat16{});
  check_launch("adamw");
}

}  // namespace mcore_bridge::cuda
