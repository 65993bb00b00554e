// Softmax statistics and gradients of logits, one block a row; the second pass over a row finds it in the cache.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kThreads = 512;

/// A running maximum and the sum of exponentials relative to it.
struct Running {
  float maximum, sum;
};

__device__ __forceinline__ Running merge(Running a, Running b) {
  const float maximum = fmaxf(a.maximum, b.maximum);
  if (maximum == -INFINITY) return {maximum, 0.f};
  return {maximum, a.sum * __expf(a.maximum - maximum) + b.sum * __expf(b.maximum - maximum)};
}

template <class T, bool kStatistics, bool kGradient>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(CrossEntropy p) {
  constexpr int N = 16 / sizeof(T);
  const int64_t row = blockIdx.x;
  auto* logits = static_cast<T*>(p.logits) + row * p.stride;
  const int64_t label = p.labels[row], column = label < 0 ? -1 : label - p.first_column;
  const bool here = column >= 0 && column < p.columns;
  float maximum, sum;
  if constexpr (kStatistics) {
    __shared__ Running scratch[kThreads / 32];
    Running running{-INFINITY, 0.f};
    for (int64_t at = threadIdx.x * N; at < p.columns; at += kThreads * N) {
      float values[N];
      load<T, N>(logits + at, values);
      float top = running.maximum;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (at + j >= p.columns) values[j] = -INFINITY;
        top = fmaxf(top, values[j]);
      }
      if (top == -INFINITY) continue;
      running.sum *= __expf(running.maximum - top);
#pragma unroll
      for (int j = 0; j < N; ++j) running.sum += __expf(values[j] - top);
      running.maximum = top;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const Running other{__shfl_xor_sync(0xffffffffu, running.maximum, offset),
                          __shfl_xor_sync(0xffffffffu, running.sum, offset)};
      running = merge(running, other);
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = running;
    __syncthreads();
    running = scratch[0];
    for (int warp = 1; warp < kThreads / 32; ++warp) running = merge(running, scratch[warp]);
    maximum = running.maximum;
    sum = running.sum;
    if (threadIdx.x == 0) {
      p.maximum[row] = maximum;
      p.sum[row] = sum;
      p.target[row] = here ? static_cast<float>(logits[column]) : 0.f;
    }
    __syncthreads();  // the label's logit is read before it is overwritten
  } else {
    maximum = p.maximum[row];
    sum = p.sum[row];
  }
  if constexpr (kGradient) {
    const float scale = label < 0 ? 0.f : p.weight ? p.weight[row] : static_cast<float>(*p.scale);
    const float inverse = scale / sum;
    for (int64_t at = threadIdx.x * N; at < p.stride; at += kThreads * N) {
      float values[N];
      load<T, N>(logits + at, values);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        values[j] = at + j < p.columns && scale != 0.f ? __expf(values[j] - maximum) * inverse : 0.f;
        if (here && at + j == column) values[j] -= scale;
      }
      store<T, N>(logits + at, values);
    }
  }
}

template <bool kStatistics, bool kGradient>
void launch(const CrossEntropy& p, Type type, Stream stream) {
  with_type(type, [&](auto zero) {
    cross_entropy_kernel<decltype(zero), kStatistics, kGradient><<<p.rows, kThreads, 0, native(stream)>>>(p);
  });
  check_launch("cross_entropy");
}

}  // namespace

void cross_entropy_statistics(const CrossEntropy& p, Type type, Stream stream) { launch<true, false>(p, type, stream); }
void cross_entropy_gradient(const CrossEntropy& p, Type type, Stream stream) { launch<false, true>(p, type, stream); }
void cross_entropy_both(const CrossEntropy& p, Type type, Stream stream) { launch<true, true>(p, type, stream); }

}  // namespace mcore_bridge::cuda
