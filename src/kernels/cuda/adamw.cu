// AdamW of many tensors in one launch: gradient, moments, master and the low-precision copy in one pass.
#include <algorithm>
#include <type_traits>

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

/// Masters, and the low-precision copies that follow them; null: none.
template <class Master, class Low>
struct Masters {
  Master* master;
  Low* low;
  __device__ __forceinline__ float get(int64_t i) const { return master[i]; }
  __device__ __forceinline__ void put(int64_t i, float value) const {
    master[i] = static_cast<Master>(value);
    if (low) low[i] = static_cast<Low>(value);
  }
  template <int N>
  __device__ __forceinline__ void get(int64_t i, float (&to)[N]) const {
    load<Master, N>(master + i, to);
  }
  template <int N>
  __device__ __forceinline__ void put(int64_t i, const float (&from)[N]) const {
    store<Master, N>(master + i, from);
    if (low) store<Low, N>(low + i, from);
  }
};

/// In place of a master, what its bf16 copy lacks: see kernels/param_remainder.h.
struct Remainder {
  uint16_t bits;
};

template <>
struct Masters<Remainder, __nv_bfloat16> {
  Remainder* master;
  __nv_bfloat16* low;
  __device__ __forceinline__ float get(int64_t i) const { return joined(low[i], master[i]); }
  __device__ __forceinline__ void put(int64_t i, float value) const { split(value, low[i], master[i]); }
  template <int N>
  __device__ __forceinline__ void get(int64_t i, float (&to)[N]) const {
    const auto lows = *reinterpret_cast<const Pack<__nv_bfloat16, N>*>(low + i);
    const auto rests = *reinterpret_cast<const Pack<Remainder, N>*>(master + i);
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = joined(lows.values[j], rests.values[j]);
  }
  template <int N>
  __device__ __forceinline__ void put(int64_t i, const float (&from)[N]) const {
    Pack<__nv_bfloat16, N> lows;
    Pack<Remainder, N> rests;
#pragma unroll
    for (int j = 0; j < N; ++j) split(from[j], lows.values[j], rests.values[j]);
    *reinterpret_cast<Pack<__nv_bfloat16, N>*>(low + i) = lows;
    *reinterpret_cast<Pack<Remainder, N>*>(master + i) = rests;
  }
  static __device__ __forceinline__ float joined(__nv_bfloat16 low, Remainder rest) {
    const uint32_t upper = __bfloat16_as_ushort(low) - (rest.bits >> 15);
    return __uint_as_float(upper << 16 | rest.bits);
  }
  static __device__ __forceinline__ void split(float value, __nv_bfloat16& low, Remainder& rest) {
    const uint32_t bits = isnan(value) ? 0x7fc00000u : __float_as_uint(value);
    rest.bits = static_cast<uint16_t>(bits);
    low = __ushort_as_bfloat16(static_cast<uint16_t>((bits >> 16) + (rest.bits >> 15)));
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
  const Masters<Master, Low> masters{static_cast<Master*>(p.master[share.tensor]),
                                     static_cast<Low*>(p.parameter[share.tensor])};
  const auto* grad = static_cast<const Grad*>(p.grad[share.tensor]);
  auto* exp_avg = static_cast<First*>(p.exp_avg[share.tensor]);
  auto* exp_avg_sq = static_cast<Second*>(p.exp_avg_sq[share.tensor]);
  auto one = [&](int64_t i) {
    float w = masters.get(i), g = grad[i], m = exp_avg[i], v = exp_avg_sq[i];
    update(w, g, m, v);
    masters.put(i, w);
    exp_avg[i] = static_cast<First>(m);
    exp_avg_sq[i] = static_cast<Second>(v);
  };
  const auto aligned = [](const auto* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % (N * sizeof(*pointer)) == 0;
  };
  if (!(aligned(masters.master) && aligned(grad) && aligned(exp_avg) && aligned(exp_avg_sq) && aligned(masters.low))) {
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
    masters.get(i, w);
    load<Grad, N>(grad + i, g);
    load<First, N>(exp_avg + i, m);
    load<Second, N>(exp_avg_sq + i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) update(w[j], g[j], m[j], v[j]);
    masters.put(i, w);
    store<First, N>(exp_avg + i, m);
    store<Second, N>(exp_avg_sq + i, v);
  }
}

}  // namespace

void adamw(const AdamW& p, const AdamWTypes& types, Stream stream) {
  const auto launch = [&](auto half) {
    using Half = decltype(half);
    const auto either = [](Type type, auto f) { type == Type::kFloat ? f(float{}) : f(Half{}); };
    const auto rest = [&](auto master, auto low) {
      either(types.grad, [&](auto grad) {
        either(types.exp_avg, [&](auto first) {
          either(types.exp_avg_sq, [&](auto second) {
            adamw_kernel<decltype(master), decltype(grad), decltype(first), decltype(second), decltype(low)>
                <<<p.first_block[p.count], kThreads, 0, native(stream)>>>(p);
          });
        });
      });
    };
    if constexpr (std::is_same_v<Half, __nv_bfloat16>) {
      if (types.remainder) return rest(Remainder{}, Half{});
    }
    either(types.master, [&](auto master) { either(types.parameter, [&](auto low) { rest(master, low); }); });
  };
  types.has(Type::kHalf) ? launch(__half{}) : launch(__nv_bfloat16{});
  check_launch("adamw");
}

}  // namespace mcore_bridge::cuda
