// 16-byte loads and stores as fp32 arrays, and sums over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace mcore_bridge::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

template <class T, int N>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = static_cast<float>(pack.values[i]);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.values[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

/// Sum over the block, known to all threads. `scratch`: 33 floats. blockDim.x is a multiple of 32.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();  // the last use of scratch
  if (threadIdx.x % 32 == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) {
    float total = threadIdx.x < warps ? scratch[threadIdx.x] : 0.f;
    total = warp_sum(total);
    if (threadIdx.x == 0) scratch[32] = total;
  }
  __syncthreads();
  return scratch[32];
}

inline void check_launch(const char* what) {
  const auto error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

/// Calls f(T{}) with the C++ type of `type`.
template <class F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::kFloat:
      return f(float{});
    case Type::kBFloat16:
      return f(__nv_bfloat16{});
    case Type::kHalf:
      return f(__half{});
  }
}

}  // namespace mcore_bridge::cuda
