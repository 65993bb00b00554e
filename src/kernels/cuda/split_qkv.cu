// A warp takes a few neighbouring heads of a fused [groups, per_group + 2, d] row apart, normalises and rotates them on
// the way; and the way back. Several heads at a time, so that their loads are under way together and share the token's
// angles.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

/// Heads in flight: registers for E elements each.
template <int E>
constexpr int kHeads = E > 4 ? 2 : 4;

/// A place in the fused row, and where its head goes.
struct Head {
  uint32_t token, row_group, part;
  int kind;          ///< 0 query, 1 key, 2 value
  int64_t from, to;  ///< offsets in elements, of mixed and of q, k or v
};

__device__ __forceinline__ void place(const SplitQkv& p, Head& head) {
  const uint32_t per_group = p.per_group;
  head.kind = head.part < per_group ? 0 : head.part == per_group ? 1 : 2;
  head.from = (static_cast<int64_t>(head.row_group) * (per_group + 2) + head.part) * p.d;
  head.to = static_cast<int64_t>(head.kind == 0 ? head.row_group * per_group + head.part : head.row_group) * p.d;
}

/// Heads [first, first + N), those from `all` on like the last. 32-bit: 64-bit divisions would take longer than the
/// memory access.
template <int N>
__device__ __forceinline__ void heads_of(const SplitQkv& p, uint32_t first, uint32_t all, Head (&heads)[N]) {
  const uint32_t groups = p.groups, slots = p.per_group + 2;
  Head head;
  head.row_group = first / slots;
  head.part = first - head.row_group * slots;
  head.token = head.row_group / groups;
  uint32_t group = head.row_group - head.token * groups;
  place(p, head);
  heads[0] = head;
#pragma unroll
  for (int u = 1; u < N; ++u) {
    if (first + u < all) {
      if (++head.part == slots) {
        head.part = 0;
        ++head.row_group;
        if (++group == groups) {
          group = 0;
          ++head.token;
        }
      }
      place(p, head);
    }
    heads[u] = head;
  }
}

/// A token's angles for this lane's E neighbouring elements of a head.
template <class T, int E>
class Rotation {
 public:
  __device__ __forceinline__ Rotation(const SplitQkv& p, int lane) : p_(p), index_(lane * E) {
    if (p.interleaved) {
      turns_ = index_ < 2 * p.half;
      return;
    }
    const int half = static_cast<int>(p.half), shift = half / E;  // half is a multiple of E
    low_ = index_ < half;
    turns_ = index_ < 2 * half;
    partner_ = low_ ? lane + shift : turns_ ? lane - shift : lane;
    index_ = low_ ? index_ : turns_ ? index_ - half : 0;
  }

  __device__ __forceinline__ void at(uint32_t token) {
    if (p_.half == 0 || token == token_) return;
    token_ = token;
    const auto row = (p_.table_per_batch ? token : token / static_cast<uint32_t>(p_.batch)) * p_.half;
    const auto *cos = static_cast<const T*>(p_.cos) + row, *sin = static_cast<const T*>(p_.sin) + row;
    if (!p_.interleaved) {
      load<T, E>(cos + index_, cos_);
      load<T, E>(sin + index_, sin_);
      return;
    }
#pragma unroll
    for (int j = 0; j < E / 2; ++j) {
      const int pair = index_ / 2 + j;
      const bool turns = pair < p_.half;
      cos_[j] = turns ? static_cast<float>(cos[pair]) : 1.f;
      sin_[j] = turns ? static_cast<float>(sin[pair]) : 0.f;
    }
  }

  /// `sign` -1 turns back. All lanes of the warp together.
  __device__ __forceinline__ void turn(float sign, float (&values)[E]) const {
    if (p_.half == 0) return;
    if (p_.interleaved) {
      if (!turns_) return;
#pragma unroll
      for (int j = 0; j < E / 2; ++j) {
        const float first = values[2 * j], second = values[2 * j + 1], s = sign * sin_[j];
        values[2 * j] = first * cos_[j] - second * s;
        values[2 * j + 1] = second * cos_[j] + first * s;
      }
      return;
    }
    const float side = low_ ? -sign : sign;
#pragma unroll
    for (int j = 0; j < E; ++j) {
      const float other = __shfl_sync(0xffffffffu, values[j], partner_);
      if (turns_) values[j] = values[j] * cos_[j] + side * other * sin_[j];
    }
  }

 private:
  const SplitQkv& p_;
  int index_, partner_ = 0;
  bool low_ = false, turns_ = false;
  uint32_t token_ = 0xffffffffu;
  float cos_[E], sin_[E];
};

template <int E>
__device__ __forceinline__ float mean_square(const float (&values)[E], int64_t d) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < E; ++j) sum += values[j] * values[j];
  return warp_sum(sum) / static_cast<float>(d);
}

/// This lane's factors of query and key norms.
template <class T, int E>
struct NormWeights {
  float q[E], k[E];
  __device__ __forceinline__ NormWeights(const SplitQkv& p, int lane) {
    if (!p.q_weight) return;
    load<T, E>(static_cast<const T*>(p.q_weight) + lane * E, q);
    load<T, E>(static_cast<const T*>(p.k_weight) + lane * E, k);
    if (!p.zero_centered) return;
#pragma unroll
    for (int j = 0; j < E; ++j) {
      q[j] += 1.f;
      k[j] += 1.f;
    }
  }
};

template <class T, int E>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ SplitQkv p) {
  constexpr int N = kHeads<E>;
  const int lane = threadIdx.x % 32;
  const uint32_t all = p.tokens * p.groups * (p.per_group + 2);
  const uint32_t first = (blockIdx.x * kWarps + threadIdx.x / 32) * N;
  if (first >= all) return;
  Head heads[N];
  heads_of(p, first, all, heads);
  float values[N][E];
#pragma unroll
  for (int u = 0; u < N; ++u)
    if (heads[u].kind < 2 || p.v) load<T, E>(static_cast<const T*>(p.mixed) + heads[u].from + lane * E, values[u]);
  const NormWeights<T, E> weights(p, lane);
  Rotation<T, E> rotation(p, lane);
  rotation.at(heads[0].token);
#pragma unroll
  for (int u = 0; u < N; ++u) {
    const auto& head = heads[u];
    if (first + u >= all || (head.kind == 2 && !p.v)) continue;
    if (head.kind < 2) {
      if (p.q_weight) {
        const float rstd = rsqrtf(mean_square(values[u], p.d) + p.epsilon);
#pragma unroll
        for (int j = 0; j < E; ++j) values[u][j] *= rstd * (head.kind == 0 ? weights.q[j] : weights.k[j]);
      }
      rotation.at(head.token);
      rotation.turn(1.f, values[u]);
    }
    auto* to = static_cast<T*>(head.kind == 0 ? p.q : head.kind == 1 ? p.k : p.v);
    store<T, E>(to + head.to + lane * E, values[u]);
  }
}

template <class T, int E>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ SplitQkvBackward b) {
  constexpr int N = kHeads<E>;
  const auto& p = b.forward;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t all = p.tokens * p.groups * (p.per_group + 2), step = gridDim.x * kWarps * N;
  const bool norm = p.q_weight;
  const NormWeights<T, E> weights(p, lane);
  Rotation<T, E> rotation(p, lane);
  float q_grads[E] = {}, k_grads[E] = {};
  for (uint32_t first = (blockIdx.x * kWarps + warp) * N; first < all; first += step) {
    Head heads[N];
    heads_of(p, first, all, heads);
    float grads[N][E], x[N][E];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const auto& head = heads[u];
      const auto* from = static_cast<const T*>(head.kind == 0 ? p.q : head.kind == 1 ? p.k : p.v);
      load<T, E>(from + head.to + lane * E, grads[u]);
      if (norm && head.kind < 2) load<T, E>(static_cast<const T*>(p.mixed) + head.from + lane * E, x[u]);
    }
    rotation.at(heads[0].token);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const auto& head = heads[u];
      if (first + u >= all) continue;
      auto& grad = grads[u];
      if (head.kind < 2) {
        rotation.at(head.token);
        rotation.turn(-1.f, grad);
        if (norm) {
          const float rstd = rsqrtf(mean_square(x[u], p.d) + p.epsilon);
          float dot = 0;
#pragma unroll
          for (int j = 0; j < E; ++j) {
            x[u][j] *= rstd;
            const float weight_grad = grad[j] * x[u][j];
            if (head.kind == 0)
              q_grads[j] += weight_grad;
            else
              k_grads[j] += weight_grad;
            grad[j] *= head.kind == 0 ? weights.q[j] : weights.k[j];
            dot += grad[j] * x[u][j];
          }
          const float mean = warp_sum(dot) / static_cast<float>(p.d);
#pragma unroll
          for (int j = 0; j < E; ++j) grad[j] = rstd * (grad[j] - x[u][j] * mean);
        }
      }
      store<T, E>(static_cast<T*>(b.grad_mixed) + head.from + lane * E, grad);
    }
  }
  if (!b.weight_partials) return;
  __shared__ float sums[kWarps][2][32 * E];
#pragma unroll
  for (int j = 0; j < E; ++j) {
    sums[warp][0][lane * E + j] = q_grads[j];
    sums[warp][1][lane * E + j] = k_grads[j];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * 32 * E; i += kThreads) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w][i / (32 * E)][i % (32 * E)];
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
  const int64_t heads = p.tokens * p.groups * (p.per_group + 2);
  with_type(type, [&](auto zero) {
    with_width(p.d, [&](auto elements) {
      constexpr int64_t per_block = kWarps * kHeads<elements>;
      const auto blocks = static_cast<unsigned>((heads + per_block - 1) / per_block);
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
