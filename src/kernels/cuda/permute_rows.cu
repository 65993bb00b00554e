// Rows of tokens to the rows of their places and back, by the row of each place alone.
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

/// A warp a place; the warps of a token read the same row, which stays in the first cache.
template <class T, bool kProducts>
__global__ void __launch_bounds__(kThreads) spread_kernel(const __grid_constant__ PermuteRows p) {
  constexpr int N = 16 / sizeof(T);
  const int64_t place = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (place >= p.tokens * p.topk) return;
  const int64_t row = p.row_of_place[place];
  const bool kept = row < p.rows;
  float product = 0;
  if (kept) {
    const float weight = p.weights ? p.weights[place] : 1.f;
    const auto* x = static_cast<const T*>(p.x) + place / p.topk * p.columns;
    const auto* against = static_cast<const T*>(p.against) + (kProducts ? row * p.columns : 0);
    auto* out = p.out ? static_cast<T*>(p.out) + row * p.columns : nullptr;
#pragma unroll 4
    for (int64_t i = lane * N; i < p.columns; i += 32 * N) {
      float values[N], others[N];
      load<T, N>(x + i, values);
      if constexpr (kProducts) {
        load<T, N>(against + i, others);
#pragma unroll
        for (int j = 0; j < N; ++j) product += values[j] * others[j];
      }
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] *= weight;
      if (out) store<T, N>(out + i, values);
    }
  }
  if constexpr (kProducts) {
    product = warp_sum(product);
    if (lane == 0) p.products[place] = product;
  }
}

/// A block a token, 16 bytes of it a thread.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ PermuteRows p) {
  constexpr int N = 16 / sizeof(T), kAhead = 4;
  const int64_t first = blockIdx.x * static_cast<int64_t>(p.topk);
  for (int64_t i = threadIdx.x * N; i < p.columns; i += blockDim.x * N) {
    float sum[N] = {};
    for (int k = 0; k < p.topk; k += kAhead) {
      float values[kAhead][N], weights[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        weights[u] = 0;
        if (k + u >= p.topk) continue;
        const int64_t row = p.row_of_place[first + k + u];
        if (row >= p.rows) continue;
        weights[u] = p.weights ? p.weights[first + k + u] : 1.f;
        load<T, N>(static_cast<const T*>(p.x) + row * p.columns + i, values[u]);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (weights[u] == 0) continue;
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += weights[u] * values[u][j];
      }
    }
    store<T, N>(static_cast<T*>(p.out) + blockIdx.x * p.columns + i, sum);
  }
}

}  // namespace

void spread_rows(const PermuteRows& p, Type type, Stream stream) {
  const auto blocks = static_cast<unsigned>((p.tokens * p.topk + kWarps - 1) / kWarps);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (p.products) {
      spread_kernel<T, true><<<blocks, kThreads, 0, native(stream)>>>(p);
    } else {
      spread_kernel<T, false><<<blocks, kThreads, 0, native(stream)>>>(p);
    }
  });
  check_launch("spread_rows");
}

void combine_rows(const PermuteRows& p, Type type, Stream stream) {
  const auto packs = p.columns / vector_elements(type);
  const auto threads = static_cast<unsigned>(packs < kThreads ? (packs + 31) / 32 * 32 : kThreads);
  with_type(type, [&](auto zero) {
    combine_kernel<decltype(zero)><<<static_cast<unsigned>(p.tokens), threads, 0, native(stream)>>>(p);
  });
  check_launch("combine_rows");
}

}  // namespace mcore_bridge::cuda
