// Half a warp takes a token's fused [per_group + 2, d] row of one key/value group apart, normalises and rotates its
// heads on the way; and the way back. All addresses follow from the row by steps of d, and a lane holds both members of
// every pair that a full rotation turns, so that only the norm's sums travel between lanes.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kThreads = 256, kLanes = 16, kRows = kThreads / kLanes;

/// Heads whose loads are under way together: registers for E elements each.
template <int E>
constexpr int kHeads = E > 8 ? 1 : E > 4 ? 2 : 4;

/// The E elements of a head that are a lane's: two runs, half a head apart when all of it is rotated as (i, i + d / 2),
/// else neighbours.
template <class T, int E, bool kFull>
struct Lane {
  static constexpr int kRun = E / 2;
  int index;
  __device__ __forceinline__ Lane() : index(threadIdx.x % kLanes) {}
  __device__ __forceinline__ int position(int j) const {
    return kFull ? index * kRun + j % kRun + (j < kRun ? 0 : kLanes * kRun) : index * E + j;
  }
  __device__ __forceinline__ void read(const T* head, float (&to)[E]) const {
    float run[kRun];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load<T, kRun>(head + position(half * kRun), run);
#pragma unroll
      for (int j = 0; j < kRun; ++j) to[half * kRun + j] = run[j];
    }
  }
  __device__ __forceinline__ void write(T* head, const float (&from)[E]) const {
    float run[kRun];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) run[j] = from[half * kRun + j];
      store<T, kRun>(head + position(half * kRun), run);
    }
  }
};

/// Over the lanes of a head.
__device__ __forceinline__ float head_sum(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

/// The angles of the row's token for this lane's elements.
template <class T, int E, bool kFull>
class Rotation {
 public:
  __device__ __forceinline__ Rotation(const SplitQkv& p, const Lane<T, E, kFull>& lane, uint32_t row)
      : turns_(p.half > 0), interleaved_(p.interleaved) {
    if (!turns_) return;
    // 32-bit: 64-bit divisions would take longer than the memory access.
    const uint32_t token = row / static_cast<uint32_t>(p.groups);
    const auto at = (p.table_per_batch ? token : token / static_cast<uint32_t>(p.batch)) * p.half;
    const auto *cos = static_cast<const T*>(p.cos) + at, *sin = static_cast<const T*>(p.sin) + at;
    if constexpr (kFull) {
      load<T, E / 2>(cos + lane.position(0), cos_);
      load<T, E / 2>(sin + lane.position(0), sin_);
    } else if (interleaved_) {
#pragma unroll
      for (int j = 0; j < E / 2; ++j) {
        const int pair = lane.position(0) / 2 + j;
        const bool turns = pair < p.half;
        cos_[j] = turns ? static_cast<float>(cos[pair]) : 1.f;
        sin_[j] = turns ? static_cast<float>(sin[pair]) : 0.f;
      }
    } else {
      const int half = static_cast<int>(p.half), shift = half / E, first = lane.position(0);  // E divides half
      low_ = first < half;
      turned_ = first < 2 * half;
      partner_ = low_ ? lane.index + shift : turned_ ? lane.index - shift : lane.index;
      const int pair = low_ ? first : turned_ ? first - half : 0;
#pragma unroll
      for (int j = 0; j < E; ++j) {
        cos_[j] = static_cast<float>(cos[pair + j]);
        sin_[j] = static_cast<float>(sin[pair + j]);
      }
    }
  }

  /// `sign` -1 turns back. All lanes of the warp together.
  __device__ __forceinline__ void turn(float sign, float (&values)[E]) const {
    if (!turns_) return;
    if constexpr (kFull) {
#pragma unroll
      for (int j = 0; j < E / 2; ++j) turn(sign * sin_[j], cos_[j], values[j], values[j + E / 2]);
    } else if (interleaved_) {
#pragma unroll
      for (int j = 0; j < E / 2; ++j) turn(sign * sin_[j], cos_[j], values[2 * j], values[2 * j + 1]);
    } else {
      const float side = low_ ? -sign : sign;
#pragma unroll
      for (int j = 0; j < E; ++j) {
        const float other = __shfl_sync(0xffffffffu, values[j], partner_, kLanes);
        if (turned_) values[j] = values[j] * cos_[j] + side * other * sin_[j];
      }
    }
  }

 private:
  static __device__ __forceinline__ void turn(float sin, float cos, float& first, float& second) {
    const float x = first, y = second;
    first = x * cos - y * sin;
    second = y * cos + x * sin;
  }

  bool turns_, interleaved_, low_ = false, turned_ = false;
  int partner_ = 0;
  float cos_[kFull ? E / 2 : E], sin_[kFull ? E / 2 : E];
};

template <int E>
__device__ __forceinline__ float reciprocal_norm(const SplitQkv& p, const float (&values)[E]) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < E; ++j) sum += values[j] * values[j];
  return rsqrtf(head_sum(sum) / static_cast<float>(E * kLanes) + p.epsilon);
}

/// A norm's factors of this lane's elements.
template <class T, int E, bool kFull>
__device__ __forceinline__ void read_factors(const SplitQkv& p, const void* weight, const Lane<T, E, kFull>& lane,
                                             float (&factors)[E]) {
  if (!weight) return;
  lane.read(static_cast<const T*>(weight), factors);
  if (!p.zero_centered) return;
#pragma unroll
  for (int j = 0; j < E; ++j) factors[j] += 1.f;
}

template <class T, int E, bool kFull>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ SplitQkv p) {
  constexpr int N = kHeads<E>, d = E * kLanes;
  const Lane<T, E, kFull> lane;
  const uint32_t rows = p.tokens * p.groups, place = blockIdx.x * kRows + threadIdx.x / kLanes;
  const bool live = place < rows;  // the others go along, as the lanes of a warp exchange numbers
  const int64_t row = live ? place : rows - 1;
  const int per_group = static_cast<int>(p.per_group);
  const bool norm = p.q_weight;
  const auto* from = static_cast<const T*>(p.mixed) + row * (per_group + 2) * d;
  float key[E], value[E], factors[E];
  lane.read(from + per_group * d, key);
  if (p.v) lane.read(from + (per_group + 1) * d, value);
  const Rotation<T, E, kFull> rotation(p, lane, row);
  auto finish = [&](float(&x)[E], T* to) {
    if (norm) {
      const float rstd = reciprocal_norm(p, x);
#pragma unroll
      for (int j = 0; j < E; ++j) x[j] *= rstd * factors[j];
    }
    rotation.turn(1.f, x);
    if (live) lane.write(to, x);
  };
  read_factors(p, p.q_weight, lane, factors);
  auto* to = static_cast<T*>(p.q) + row * per_group * d;
  for (int head = 0; head < per_group; head += N) {
    float x[N][E];
#pragma unroll
    for (int u = 0; u < N; ++u)
      if (head + u < per_group) lane.read(from + (head + u) * d, x[u]);
#pragma unroll
    for (int u = 0; u < N; ++u)
      if (head + u < per_group) finish(x[u], to + (head + u) * d);
  }
  read_factors(p, p.k_weight, lane, factors);
  finish(key, static_cast<T*>(p.k) + row * d);
  if (p.v && live) lane.write(static_cast<T*>(p.v) + row * d, value);
}

template <class T, int E, bool kFull>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ SplitQkvBackward b) {
  constexpr int N = kHeads<E>, d = E * kLanes;
  const auto& p = b.forward;
  const Lane<T, E, kFull> lane;
  const int slot = threadIdx.x / kLanes, per_group = static_cast<int>(p.per_group);
  const uint32_t rows = p.tokens * p.groups;
  const bool norm = p.q_weight;
  float q_factors[E], k_factors[E], q_grads[E] = {}, k_grads[E] = {};
  read_factors(p, p.q_weight, lane, q_factors);
  read_factors(p, p.k_weight, lane, k_factors);
  for (uint32_t first = blockIdx.x * kRows; first < rows; first += gridDim.x * kRows) {
    const bool live = first + slot < rows;
    const int64_t row = live ? first + slot : rows - 1;
    const Rotation<T, E, kFull> rotation(p, lane, row);
    const int64_t fused = row * (per_group + 2) * d;
    auto* to = static_cast<T*>(b.grad_mixed) + fused;
    auto finish = [&](float(&grad)[E], float(&x)[E], const float(&factors)[E], float(&weight_grads)[E], T* out) {
      rotation.turn(-1.f, grad);
      if (norm) {
        const float rstd = reciprocal_norm(p, x);
        float dot = 0;
#pragma unroll
        for (int j = 0; j < E; ++j) {
          x[j] *= rstd;
          if (live) weight_grads[j] += grad[j] * x[j];
          grad[j] *= factors[j];
          dot += grad[j] * x[j];
        }
        const float mean = head_sum(dot) / static_cast<float>(d);
#pragma unroll
        for (int j = 0; j < E; ++j) grad[j] = rstd * (grad[j] - x[j] * mean);
      }
      if (live) lane.write(out, grad);
    };
    const auto *x_from = static_cast<const T*>(p.mixed) + (norm ? fused : 0),
               *from = static_cast<const T*>(p.q) + row * per_group * d;
    float value[E];
    lane.read(static_cast<const T*>(p.v) + row * d, value);
    for (int head = 0; head <= per_group; head += N) {  // the key behind the queries
      float grads[N][E], x[N][E];
#pragma unroll
      for (int u = 0; u < N; ++u) {
        if (head + u > per_group) continue;
        lane.read(head + u < per_group ? from + (head + u) * d : static_cast<const T*>(p.k) + row * d, grads[u]);
        if (norm) lane.read(x_from + (head + u) * d, x[u]);
      }
#pragma unroll
      for (int u = 0; u < N; ++u) {
        if (head + u < per_group)
          finish(grads[u], x[u], q_factors, q_grads, to + (head + u) * d);
        else if (head + u == per_group)
          finish(grads[u], x[u], k_factors, k_grads, to + (head + u) * d);
      }
    }
    if (live) lane.write(to + (per_group + 1) * d, value);
  }
  if (!b.weight_partials) return;
  __shared__ float sums[kRows][2][d];
#pragma unroll
  for (int j = 0; j < E; ++j) {
    sums[slot][0][lane.position(j)] = q_grads[j];
    sums[slot][1][lane.position(j)] = k_grads[j];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * d; i += kThreads) {
    float total = 0;
    for (int each = 0; each < kRows; ++each) total += sums[each][i / d][i % d];
    b.weight_partials[blockIdx.x * static_cast<int64_t>(2 * d) + i] = total;
  }
}

/// Calls f with a zero of the type, the elements of a lane and whether whole heads turn as (i, i + d / 2).
template <class F>
void with_layout(const SplitQkv& p, Type type, F f) {
  const bool full = !p.interleaved && 2 * p.half == p.d;
  auto with_width = [&](auto zero, auto whole) {
    if (p.d == 64) return f(zero, std::integral_constant<int, 4>{}, whole);
    if (p.d == 128) return f(zero, std::integral_constant<int, 8>{}, whole);
    return f(zero, std::integral_constant<int, 16>{}, whole);
  };
  with_type(type, [&](auto zero) { full ? with_width(zero, std::true_type{}) : with_width(zero, std::false_type{}); });
}

}  // namespace

void split_qkv_forward(const SplitQkv& p, Type type, Stream stream) {
  const auto blocks = static_cast<unsigned>((p.tokens * p.groups + kRows - 1) / kRows);
  with_layout(p, type, [&](auto zero, auto elements, auto full) {
    forward_kernel<decltype(zero), elements, full><<<blocks, kThreads, 0, native(stream)>>>(p);
  });
  check_launch("split_qkv_forward");
}

void split_qkv_backward(const SplitQkvBackward& p, Type type, Stream stream) {
  with_layout(p.forward, type, [&](auto zero, auto elements, auto full) {
    backward_kernel<decltype(zero), elements, full><<<p.blocks, kThreads, 0, native(stream)>>>(p);
  });
  check_launch("split_qkv_backward");
}

}  // namespace mcore_bridge::cuda
