// RMSNorm, one block a row; a row stays in registers, so memory is read and written once.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

template <class T, int kPacks>
__global__ void __launch_bounds__(kPacks == 1 ? 512 : 1024) forward_kernel(RmsNorm p) {
  constexpr int N = 16 / sizeof(T);
  __shared__ float scratch[33];
  const int64_t row = blockIdx.x, packs = p.columns / N;
  const auto* x = static_cast<const T*>(p.x) + row * p.columns;
  const auto* delta = p.delta ? static_cast<const T*>(p.delta) + row * p.columns : nullptr;
  float values[kPacks][N];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t pack = threadIdx.x + static_cast<int64_t>(i) * blockDim.x;
    if (pack >= packs) continue;
    load<T, N>(x + pack * N, values[i]);
    if (delta) {
      float other[N];
      load<T, N>(delta + pack * N, other);
#pragma unroll
      for (int j = 0; j < N; ++j) values[i][j] = static_cast<float>(static_cast<T>(values[i][j] + other[j]));
      store<T, N>(static_cast<T*>(p.sum) + row * p.columns + pack * N, values[i]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares += values[i][j] * values[i][j];
  }
  const float rstd = rsqrtf(block_sum(squares, scratch) / static_cast<float>(p.columns) + p.epsilon);
  if (threadIdx.x == 0) p.rstd[row] = rstd;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t pack = threadIdx.x + static_cast<int64_t>(i) * blockDim.x;
    if (pack >= packs) continue;
    float weight[N];
    load<T, N>(static_cast<const T*>(p.weight) + pack * N, weight);
#pragma unroll
    for (int j = 0; j < N; ++j) values[i][j] = values[i][j] * rstd * (p.zero_centered ? 1.f + weight[j] : weight[j]);
    store<T, N>(static_cast<T*>(p.normed) + row * p.normed_stride + pack * N, values[i]);
  }
}

template <class T>
__global__ void apply_kernel(RmsNorm p) {
  constexpr int N = 16 / sizeof(T);
  const int64_t packs = p.columns / N, all = p.rows * packs;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / packs, pack = i % packs;
    float values[N], weight[N];
    load<T, N>(static_cast<const T*>(p.x) + i * N, values);
    load<T, N>(static_cast<const T*>(p.weight) + pack * N, weight);
    const float rstd = p.rstd[row];
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = values[j] * rstd * (p.zero_centered ? 1.f + weight[j] : weight[j]);
    store<T, N>(static_cast<T*>(p.normed) + i * N, values);
  }
}

template <class T, int kPacks>
__global__ void __launch_bounds__(kPacks == 1 ? 512 : 1024) backward_kernel(RmsNormBackward p) {
  constexpr int N = 16 / sizeof(T);
  __shared__ float scratch[33];
  const int64_t packs = p.columns / N;
  float weight_grad[kPacks][N] = {};
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const auto offset = row * p.columns;
    const float rstd = p.rstd[row];
    float x[kPacks][N], grad[kPacks][N];
    Pack<T, N> residual[kPacks];  // under way while the lanes wait for each other
    float dot = 0;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t pack = threadIdx.x + static_cast<int64_t>(i) * blockDim.x;
      if (pack >= packs) continue;
      float weight[N], normed[N];
      load<T, N>(static_cast<const T*>(p.x) + offset + pack * N, x[i]);
      load<T, N>(static_cast<const T*>(p.grad) + offset + pack * N, grad[i]);
      load<T, N>(static_cast<const T*>(p.weight) + pack * N, weight);
      if (p.grad_residual)
        residual[i] = *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(p.grad_residual) + offset + pack * N);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float scale = p.zero_centered ? 1.f + weight[j] : weight[j];
        x[i][j] *= rstd;
        normed[j] = x[i][j] * scale;
        weight_grad[i][j] += grad[i][j] * x[i][j];
        grad[i][j] *= scale;
        dot += grad[i][j] * x[i][j];
      }
      if (p.normed) store<T, N>(static_cast<T*>(p.normed) + offset + pack * N, normed);
    }
    const float mean = block_sum(dot, scratch) / static_cast<float>(p.columns);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t pack = threadIdx.x + static_cast<int64_t>(i) * blockDim.x;
      if (pack >= packs) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        grad[i][j] = rstd * (grad[i][j] - x[i][j] * mean);
        if (p.grad_residual) grad[i][j] += static_cast<float>(residual[i].values[j]);
      }
      store<T, N>(static_cast<T*>(p.grad_x) + offset + pack * N, grad[i]);
    }
  }
  if (!p.weight_partials) return;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t pack = threadIdx.x + static_cast<int64_t>(i) * blockDim.x;
    if (pack >= packs) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) p.weight_partials[blockIdx.x * p.columns + pack * N + j] = weight_grad[i][j];
  }
}

/// Packs a thread holds, so that a block has at most `threads` threads.
int packs_per_thread(int64_t packs, int64_t threads) {
  int each = 1;
  while (packs > each * threads) each *= 2;
  return each;
}

int block_threads(int64_t packs, int each) { return static_cast<int>(((packs + each - 1) / each + 31) / 32 * 32); }

template <class F>
void with_packs(int each, F f) {
  switch (each) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    default:
      return f(std::integral_constant<int, 4>{});
  }
}

}  // namespace

void rms_norm_forward(const RmsNorm& p, Type type, Stream stream) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t packs = p.columns / (16 / sizeof(T));
    const int each = packs_per_thread(packs, packs <= 1024 ? 512 : 1024);
    with_packs(each, [&](auto count) {
      forward_kernel<T, count><<<p.rows, block_threads(packs, count), 0, native(stream)>>>(p);
    });
  });
  check_launch("rms_norm_forward");
}

void rms_norm_apply(const RmsNorm& p, Type type, Stream stream) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t packs = p.rows * p.columns / (16 / sizeof(T));
    apply_kernel<T><<<std::min<int64_t>((packs + 255) / 256, 1 << 20), 256, 0, native(stream)>>>(p);
  });
  check_launch("rms_norm_apply");
}

void rms_norm_backward(const RmsNormBackward& p, Type type, Stream stream) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t packs = p.columns / (16 / sizeof(T));
    const int each = packs_per_thread(packs, packs <= 1024 ? 512 : 1024);
    with_packs(each, [&](auto count) {
      backward_kernel<T, count><<<p.blocks, block_threads(packs, count), 0, native(stream)>>>(p);
    });
  });
  check_launch("rms_norm_backward");
}

}  // namespace mcore_bridge::cuda
