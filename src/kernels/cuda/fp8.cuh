// Numbers to FP8 codes, as every kernel makes them.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace mcore_bridge::cuda {

/// 448 / amax and its inverse, as the checkpoints' format has them (bridge/formats/fp8.h).
__device__ __forceinline__ float factor_of(float amax, float largest) {
  const float factor = amax > 0.f ? __fdiv_rn(largest, amax) : 1.f;
  return isfinite(factor) ? factor : 0.f;
}
__device__ __forceinline__ float scale_of(float factor) { return factor > 0.f ? __fdiv_rn(1.f, factor) : 1.f; }

/// `amax` is not negative: its bits order as integers do.
__device__ __forceinline__ void raise(float* amax, float value) {
  atomicMax(reinterpret_cast<int*>(amax), __float_as_int(value));
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

/// Largest over a block of kWarps warps, known to all threads. `scratch`: kWarps floats.
template <int kWarps>
__device__ __forceinline__ float block_max(float value, float* scratch) {
  value = warp_max(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float result = scratch[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) result = fmaxf(result, scratch[i]);
  return result;
}

template <bool kE5M2>
__device__ __forceinline__ uint32_t two(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kE5M2 ? __NV_E5M2 : __NV_E4M3);
}

}  // namespace mcore_bridge::cuda
