// One warp a head: a fused [groups, per_group + 2, d] row taken apart, heads normalised and rotated on the way, and the
// way back.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kThreads = 256;

/// Where one head of the fused row goes.
struct Head {
  uint32_t token;
  int kind;          ///< 0 query, 1 key, 2 value
  int64_t from, to;  ///< offsets in elements, of mixed and of q, k or v
};

// 32-bit: 64-bit divisions would take longer than the memory access.
__device__ __forceinline__ Head head_of(const SplitQkv& p, uint32_t item) {
  const uint32_t groups = p.groups, per_group = p.per_group, slots = per_group + 2;
  Head head;
  const uint32_t row_group = item / slots, part = item - row_group * slots;
  head.token = row_group / groups;
  head.kind = part < per_group ? 0 : part == per_group ? 1 : 2;
  head.from = static_cast<int64_t>(item) * p.d;
  head.to = static_cast<int64_t>(head.kind == 0 ? row_group * per_group + part : row_group) * p.d;
  return head;
}

/// Rotates a head whose lane holds E neighbouring elements; `sign` -1 turns back.
template <class T, int E>
__device__ __forceinline__ void rotate(const SplitQkv& p, uint32_t token, int lane, float sign, float (&values)[E]) {
  if (p.half == 0) return;
  const auto at = (p.table_per_batch ? token : token / static_cast<uint32_t>(p.batch)) * p.half;
  const auto *cos = static_cast<const T*>(p.cos) + at, *sin = static_cast<const T*>(p.sin) + at;
  if (p.interleaved) {
#pragma unroll
    for (int j = 0; j < E; j += 2) {
      const int pair = (lane * E + j) / 2;
      if (pair >= p.half) continue;
      const float c = static_cast<float>(cos[pair]), s = sign * static_cast<float>(sin[pair]);
      const float first = values[j], second = values[j + 1];
      values[j] = first * c - second * s;
      values[j + 1] = second * c + first * s;
    }
    return;
  }
  const int shift = static_cast<int>(p.half) / E, index = lane * E;  // half is a multiple of E
  const bool low = index < p.half, high = !low && index < 2 * p.half;
  const int partner = low ? lane + shift : high ? lane - shift : lane;
  const int angle = low ? index : high ? index - static_cast<int>(p.half) : 0;
#pragma unroll
  for (int j = 0; j < E; ++j) {
    const float other = __shfl_sync(0xffffffffu, values[j], partner);
    if (!low && !high) continue;
    const float c = static_cast<float>(cos[angle + j]), s = sign * static_cast<float>(sin[angle + j]);
    values[j] = low ? values[j] * c - other * s : values[j] * c + other * s;
  }
}

template <int E>
__device__ __forceinline__ float mean_square(const float (&values)[E], int64_t d) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < E; ++j) sum += values[j] * values[j];
  return warp_sum(sum) / static_cast<float>(d);
}

template <class T, int E>
__global__ void __launch_bounds__(kThreads) forward_kernel(SplitQkv p) {
  const int lane = threadIdx.x % 32;
  const uint32_t all = p.tokens * p.groups * (p.per_group + 2);
  const uint32_t item = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (item >= all) return;
  const auto head = head_of(p, item);
  if (head.kind == 2 && !p.v) return;
  float values[E];
  load<T, E>(static_cast<const T*>(p.mixed) + head.from + lane * E, values);
  if (head.kind < 2) {
    if (const auto* weights = static_cast<const T*>(head.kind == 0 ? p.q_weight : p.k_weight)) {
      const float rstd = rsqrtf(mean_square(values, p.d) + p.epsilon);
      float weight[E];
      load<T, E>(weights + lane * E, weight);
#pragma unroll
      for (int j = 0; j < E; ++j) values[j] *= rstd * (p.zero_centered ? 1.f + weight[j] : weight[j]);
    }
    rotate<T, E>(p, head.token, lane, 1.f, values);
  }
  auto* to = static_cast<T*>(head.kind == 0 ? p.q : head.kind == 1 ? p.k : p.v);
  store<T, E>(to + head.to + lane * E, values);
}

template <class T, int E>
__global__ void __launch_bounds__(kThreads) backward_kernel(SplitQkvBackward b) {
  const auto& p = b.forward;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t all = p.tokens * p.groups * (p.per_group + 2), step = gridDim.x * (kThreads / 32);
  float weight_grads[2][E] = {};
  for (uint32_t item = blockIdx.x * (kThreads / 32) + warp; item < all; item += step) {
    const auto head = head_of(p, item);
    const auto* from = static_cast<const T*>(head.kind == 0 ? p.q : head.kind == 1 ? p.k : p.v);
    float grad[E];
    load<T, E>(from + head.to + lane * E, grad);
    if (head.kind < 2) {
      rotate<T, E>(p, head.token, lane, -1.f, grad);
      if (const auto* weights = static_cast<const T*>(head.kind == 0 ? p.q_weight : p.k_weight)) {
        float x[E], weight[E];
        load<T, E>(static_cast<const T*>(p.mixed) + head.from + lane * E, x);
        load<T, E>(weights + lane * E, weight);
        const float rstd = rsqrtf(mean_square(x, p.d) + p.epsilon);
        float dot = 0;
#pragma unroll
        for (int j = 0; j < E; ++j) {
          x[j] *= rstd;
          if (head.kind == 0)
            weight_grads[0][j] += grad[j] * x[j];
          else
            weight_grads[1][j] += grad[j] * x[j];
          grad[j] *= p.zero_centered ? 1.f + weight[j] : weight[j];
          dot += grad[j] * x[j];
        }
        const float mean = warp_sum(dot) / static_cast<float>(p.d);
#pragma unroll
        for (int j = 0; j < E; ++j) grad[j] = rstd * (grad[j] - x[j] * mean);
      }
    }
    store<T, E>(static_cast<T*>(b.grad_mixed) + head.from + lane * E, grad);
  }
  if (!b.weight_partials) return;
  __shared__ float sums[kThreads / 32][2][32 * E];
#pragma unroll
  for (int kind = 0; kind < 2; ++kind)
#pragma unroll
    for (int j = 0; j < E; ++j) sums[warp][kind][lane * E + j] = weight_grads[kind][j];
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * 32 * E; i += kThreads) {
    float total = 0;
    for (int w = 0; w < kThreads / 32; ++w) total += sums[w][i / (32 * E)][i % (32 * E)];
    b.weight_partials[blockIdx.x * static_cast<int64_t>(2 * 32 * E) + i] = total;
  }
}

template <class F>
void with_width(int64_t d, F f) {
  if (d == 64) return f(std::integral_constant<int, 2>{});
  if (d == 128) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 8>{});
}

}  // namespace

void split_qkv_forward(const SplitQkv& p, Type type, Stream stream) {
  const int64_t items = p.tokens * p.groups * (p.per_group + 2), per_block = kThreads / 32;
  const auto blocks = static_cast<unsigned>((items + per_block - 1) / per_block);
  with_type(type, [&](auto zero) {
    with_width(p.d, [&](auto elements) {
      forward_kernel<decltype(zero), elements><<<blocks, kThreads, 0, native(stream)>>>(p);
    });
  });
  check_launch("split_qkv_forward");
}

void split_qkv_backward(const SplitQkvBackward& p, Type type, Stream stream) {
  with_type(type, [&](auto zero) {
    with_width(p.forward.d, [&](auto elements) {
      backward_kernel<decltype(zero), elements><<<p.blocks, kThreads, 0, native(stream)>>>(p);
    });
  });
  check_launch("split_qkv_backward");
}

}  // namespace mcore_bridge::cuda
