// Values to FP8 with their scales, as they are and transposed, in one pass over the input. A block takes a tile of
// 128 x 128, a thread a patch of 8 x 8: rows leave from registers, columns by way of shared memory.
//
// Bytes an element (bf16): 2 in, 1 out for each orientation. With scales from before (delayed) that is all; else
// fp8_amax reads 2 more.
#include "fp8.h"

#include <algorithm>

#include "fp8.cuh"
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kTile = 128, kPatch = 8, kSide = kTile / kPatch, kThreads = kSide * kSide, kWarps = kThreads / 32;

template <class T>
__global__ void __launch_bounds__(kThreads) amax_kernel(const T* x, int64_t packs, float* amax) {
  constexpr int N = 16 / sizeof(T), kAhead = 4;
  __shared__ float scratch[kWarps];
  float largest = 0.f;
  const int64_t stride = gridDim.x * static_cast<int64_t>(kThreads);
  int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  for (; i + (kAhead - 1) * stride < packs; i += kAhead * stride) {
    float values[kAhead][N];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) load<T, N>(x + (i + a * stride) * N, values[a]);
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int j = 0; j < N; ++j) largest = fmaxf(largest, fabsf(values[a][j]));
  }
  for (; i < packs; i += stride) {
    float values[N];
    load<T, N>(x + i * N, values);
#pragma unroll
    for (int j = 0; j < N; ++j) largest = fmaxf(largest, fabsf(values[j]));
  }
  largest = block_max<kWarps>(largest, scratch);
  if (threadIdx.x == 0) raise(amax, largest);
}

/// Eight numbers of a row as they came: half the registers of floats where they are low precision.
template <class T>
struct Eight {
  static constexpr int kLoads = kPatch * sizeof(T) / 16, N = 16 / sizeof(T);
  Pack<T, N> packs[kLoads];
  __device__ void read(const T* from) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) packs[i] = reinterpret_cast<const Pack<T, N>*>(from)[i];
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j) packs[i].values[j] = static_cast<T>(0.f);
  }
  __device__ float operator[](int j) const { return static_cast<float>(packs[j / N].values[j % N]); }
};

template <class T, Fp8Scaling kScaling, bool kE5M2>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ Fp8Quantize p) {
  constexpr float kLargest = kE5M2 ? 57344.f : 448.f;
  __shared__ uint2 turned[kTile][kSide];
  __shared__ float maxima[kWarps][kTile];
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const int64_t row = blockIdx.y * static_cast<int64_t>(kTile) + ty * kPatch;
  const int64_t column = blockIdx.x * static_cast<int64_t>(kTile) + tx * kPatch;
  const bool inside = column < p.columns;
  Eight<T> x[kPatch];
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
    if (inside && row + i < p.rows) {
      x[i].read(static_cast<const T*>(p.x) + (row + i) * p.columns + column);
    } else {
      x[i].clear();
    }
  }

  float along_rows[kPatch], along_columns[kPatch];  // factors; only kRows has different ones
  if constexpr (kScaling == Fp8Scaling::kRows) {
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
      float largest = 0.f;
#pragma unroll
      for (int j = 0; j < kPatch; ++j) largest = fmaxf(largest, fabsf(x[i][j]));
#pragma unroll
      for (int offset = kSide / 2; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
      along_rows[i] = factor_of(largest, kLargest);
      if (p.q && tx == 0 && row + i < p.padded) p.scale[blockIdx.x * p.padded + row + i] = scale_of(along_rows[i]);
    }
    if (p.q_t) {
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < kPatch; ++i) largest = fmaxf(largest, fabsf(x[i][j]));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, kSide));
        if (threadIdx.x % 32 < kSide) maxima[threadIdx.x / 32][tx * kPatch + j] = largest;
      }
      __syncthreads();
      if (threadIdx.x < kTile) {
        float largest = maxima[0][threadIdx.x];
#pragma unroll
        for (int i = 1; i < kWarps; ++i) largest = fmaxf(largest, maxima[i][threadIdx.x]);
        const float factor = factor_of(largest, kLargest);
        maxima[0][threadIdx.x] = factor;
        const int64_t at = blockIdx.x * static_cast<int64_t>(kTile) + threadIdx.x;
        if (at < p.columns) p.scale_t[blockIdx.y * p.columns + at] = scale_of(factor);
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kPatch; ++j) along_columns[j] = maxima[0][tx * kPatch + j];
    }
  } else {
    float largest = 0.f;
    if (kScaling == Fp8Scaling::kBlocks || p.amax) {
#pragma unroll
      for (int i = 0; i < kPatch; ++i)
#pragma unroll
        for (int j = 0; j < kPatch; ++j) largest = fmaxf(largest, fabsf(x[i][j]));
      largest = block_max<kWarps>(largest, maxima[0]);
    }
    const float factor = factor_of(kScaling == Fp8Scaling::kBlocks ? largest : *p.reference, kLargest);
    if (threadIdx.x == 0) {
      if constexpr (kScaling == Fp8Scaling::kBlocks) {
        if (p.q) p.scale[blockIdx.y * p.scale_stride + blockIdx.x] = scale_of(factor);
        if (p.q_t) p.scale_t[blockIdx.x * p.scale_t_stride + blockIdx.y] = scale_of(factor);
      } else {
        if (p.amax) raise(p.amax, largest);
        if (blockIdx.x == 0 && blockIdx.y == 0) *p.scale = scale_of(factor);
      }
    }
#pragma unroll
    for (int i = 0; i < kPatch; ++i) along_rows[i] = along_columns[i] = factor;
  }

  if (p.q && inside) {
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
      if (row + i >= p.padded) break;
      const float f = along_rows[i];
      const uint2 eight{two<kE5M2>(x[i][0] * f, x[i][1] * f) | two<kE5M2>(x[i][2] * f, x[i][3] * f) << 16,
                        two<kE5M2>(x[i][4] * f, x[i][5] * f) | two<kE5M2>(x[i][6] * f, x[i][7] * f) << 16};
      *reinterpret_cast<uint2*>(p.q + (row + i) * p.columns + column) = eight;
    }
  }
  if (!p.q_t) return;
  // The slot is turned by tx, so that 16 threads of a half-warp meet 16 different banks both ways.
#pragma unroll
  for (int j = 0; j < kPatch; ++j) {
    const float f = along_columns[j];
    turned[tx * kPatch + j][ty ^ tx] = {
        two<kE5M2>(x[0][j] * f, x[1][j] * f) | two<kE5M2>(x[2][j] * f, x[3][j] * f) << 16,
        two<kE5M2>(x[4][j] * f, x[5][j] * f) | two<kE5M2>(x[6][j] * f, x[7][j] * f) << 16};
  }
  __syncthreads();
  const int64_t to = blockIdx.y * static_cast<int64_t>(kTile) + tx * kPatch;
  if (to >= p.padded) return;
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
    const int c = i * kSide + ty;
    const int64_t at = blockIdx.x * static_cast<int64_t>(kTile) + c;
    if (at >= p.columns) break;
    *reinterpret_cast<uint2*>(p.q_t + at * p.padded + to) = turned[c][tx ^ (c / kPatch)];
  }
}

template <class T, Fp8Scaling kScaling>
void launch(const Fp8Quantize& p, Stream stream) {
  const dim3 blocks(static_cast<unsigned>((p.columns + kTile - 1) / kTile),
                    static_cast<unsigned>((p.padded + kTile - 1) / kTile));
  if (p.e5m2) {
    quantize_kernel<T, kScaling, true><<<blocks, kThreads, 0, native(stream)>>>(p);
  } else {
    quantize_kernel<T, kScaling, false><<<blocks, kThreads, 0, native(stream)>>>(p);
  }
}

}  // namespace

void fp8_amax(const void* x, int64_t elements, float* amax, Type type, Stream stream) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t packs = elements / (16 / sizeof(T));
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((packs + kThreads - 1) / kThreads, 8 * 132));
    amax_kernel<T><<<blocks, kThreads, 0, native(stream)>>>(static_cast<const T*>(x), packs, amax);
  });
  check_launch("fp8_amax");
}

void fp8_quantize(const Fp8Quantize& p, Type type, Stream stream) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    switch (p.scaling) {
      case Fp8Scaling::kTensor:
        return launch<T, Fp8Scaling::kTensor>(p, stream);
      case Fp8Scaling::kRows:
        return launch<T, Fp8Scaling::kRows>(p, stream);
      case Fp8Scaling::kBlocks:
        return launch<T, Fp8Scaling::kBlocks>(p, stream);
    }
  });
  check_launch("fp8_quantize");
}

}  // namespace mcore_bridge::cuda
