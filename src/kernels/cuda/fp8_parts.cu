// FP8 codes of parts of flattened weights, whose magnitudes are agreed on in between. A warp takes 128 numbers that lie
// in one row and one block of 128 x 128, a lane 4 of them.
//
// Bytes an element: 4 in for the magnitudes; 4 in and 1 out for the codes.
#include "fp8.cuh"
#include "fp8.h"
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kLane = kFp8PartsWindow / 32;

/// The numbers of a weight that are this block's.
struct Share {
  int part = 0;
  int64_t begin, end;    // of the part
  int64_t first, last;   // of the windows
  int64_t columns, stride;
  __device__ explicit Share(const Fp8Parts& p) {
    while (static_cast<int>(blockIdx.x) >= p.first_block[part + 1]) ++part;
    begin = p.begin[part];
    end = p.end[part];
    columns = p.columns[part];
    stride = p.stride[part];
    const int64_t number = blockIdx.x - p.first_block[part];
    first = begin / kFp8PartsWindow * kFp8PartsWindow + number * kFp8PartsBlock;
    last = min(first + kFp8PartsBlock, end);
  }
  /// Where the magnitude of the window at `at` lies.
  __device__ int64_t magnitude(const Fp8Parts& p, int64_t at) const {
    const int64_t row = at / columns, block = (at - row * columns) / kFp8PartsWindow;
    return p.first[part] + row / kFp8PartsWindow * stride + block;
  }
  __device__ bool inside(int64_t at) const { return at >= begin && at + kLane <= end; }
};

/// Four numbers from element `at` on, zeros where the part has none.
template <class T>
__device__ __forceinline__ void read(const Fp8Parts& p, const Share& share, int64_t at, float (&x)[kLane]) {
  const float* from = p.values[share.part] + (at - share.begin);
  if (share.inside(at) && reinterpret_cast<uintptr_t>(from) % sizeof(float4) == 0) {
    load<float, kLane>(from, x);
  } else {
#pragma unroll
    for (int j = 0; j < kLane; ++j) x[j] = at + j >= share.begin && at + j < share.end ? from[j] : 0.f;
  }
#pragma unroll
  for (int j = 0; j < kLane; ++j) x[j] = static_cast<float>(static_cast<T>(x[j]));
}

template <class T>
__global__ void __launch_bounds__(kThreads) amax_kernel(const __grid_constant__ Fp8Parts p) {
  __shared__ float scratch[kWarps];
  const Share share(p);
  const int lane = threadIdx.x % 32;
  float all = 0.f;
#pragma unroll 4
  for (int64_t at = share.first + threadIdx.x / 32 * kFp8PartsWindow; at < share.last; at += kWarps * kFp8PartsWindow) {
    float x[kLane];
    read<T>(p, share, at + lane * kLane, x);
    float largest = 0.f;
#pragma unroll
    for (int j = 0; j < kLane; ++j) largest = fmaxf(largest, fabsf(x[j]));
    if (share.stride == 0) {
      all = fmaxf(all, largest);
    } else {
      largest = warp_max(largest);
      if (lane == 0) raise(p.amax + share.magnitude(p, at), largest);
    }
  }
  if (share.stride != 0) return;
  all = block_max<kWarps>(all, scratch);
  if (threadIdx.x == 0) raise(p.amax + p.first[share.part], all);
}

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ Fp8Parts p) {
  constexpr float kLargest = 448.f;
  const Share share(p);
  const int lane = threadIdx.x % 32;
  float factor = factor_of(p.amax[p.first[share.part]], kLargest);
#pragma unroll 4
  for (int64_t at = share.first + threadIdx.x / 32 * kFp8PartsWindow; at < share.last; at += kWarps * kFp8PartsWindow) {
    if (share.stride != 0) factor = factor_of(p.amax[share.magnitude(p, at)], kLargest);
    float x[kLane];
    const int64_t mine = at + lane * kLane;
    read<T>(p, share, mine, x);
    const uint32_t four =
        two<false>(x[0] * factor, x[1] * factor) | two<false>(x[2] * factor, x[3] * factor) << 16;
    uint8_t* to = p.codes[share.part] + (mine - share.begin);
    if (share.inside(mine) && reinterpret_cast<uintptr_t>(to) % sizeof(four) == 0) {
      *reinterpret_cast<uint32_t*>(to) = four;
    } else {
#pragma unroll
      for (int j = 0; j < kLane; ++j) {
        if (mine + j >= share.begin && mine + j < share.end) to[j] = static_cast<uint8_t>(four >> 8 * j);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ Fp8Scales p) {
  const float* amax = p.amax + p.first[blockIdx.x];
  for (int i = threadIdx.x; i < p.numbers[blockIdx.x]; i += kThreads)
    p.scale[blockIdx.x][i] = scale_of(factor_of(amax[i], 448.f));
}

}  // namespace

void fp8_parts_amax(const Fp8Parts& p, Type rounding, Stream stream) {
  with_type(rounding, [&](auto zero) {
    amax_kernel<decltype(zero)><<<p.first_block[p.count], kThreads, 0, native(stream)>>>(p);
  });
  check_launch("fp8_parts_amax");
}

void fp8_parts_quantize(const Fp8Parts& p, Type rounding, Stream stream) {
  with_type(rounding, [&](auto zero) {
    quantize_kernel<decltype(zero)><<<p.first_block[p.count], kThreads, 0, native(stream)>>>(p);
  });
  check_launch("fp8_parts_quantize");
}

void fp8_scales(const Fp8Scales& p, Stream stream) {
  scale_kernel<<<p.count, kThreads, 0, native(stream)>>>(p);
  check_launch("fp8_scales");
}

}  // namespace mcore_bridge::cuda
