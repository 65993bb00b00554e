// Sums of squares of many tensors in one launch, a number a block.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ Squares p) {
  constexpr int N = 16 / sizeof(T);
  __shared__ float scratch[33];
  int tensor = 0;
  while (static_cast<int>(blockIdx.x) >= p.first_block[tensor + 1]) ++tensor;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) - p.first_block[tensor]) * kSquaresBlock;
  const int64_t end = min(first + kSquaresBlock, p.elements[tensor]);
  const auto* x = static_cast<const T*>(p.x[tensor]);
  float sum = 0;
  int64_t rest = first;  // what is left to single elements
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    rest = end / N * N;
#pragma unroll 4
    for (int64_t i = first + threadIdx.x * N; i < rest; i += kThreads * N) {
      float values[N];
      load<T, N>(x + i, values);
#pragma unroll
      for (int j = 0; j < N; ++j) sum += values[j] * values[j];
    }
  }
  for (int64_t i = rest + threadIdx.x; i < end; i += kThreads) {
    const float value = static_cast<float>(x[i]);
    sum += value * value;
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = sum;
}

}  // namespace

void sum_of_squares(const Squares& p, Type type, Stream stream) {
  with_type(type, [&](auto zero) {
    squares_kernel<decltype(zero)><<<p.first_block[p.count], kThreads, 0, native(stream)>>>(p);
  });
  check_launch("sum_of_squares");
}

}  // namespace mcore_bridge::cuda
