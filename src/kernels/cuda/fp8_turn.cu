// FP8 codes turned round: a block takes a tile of 128 x 128, a thread a patch of 8 x 8, as in fp8_quantize.cu.
// Bytes an element: 1 in, 1 out.
#include "fp8.h"
#include "vector.cuh"

namespace mcore_bridge::cuda {
namespace {

constexpr int kTile = 128, kPatch = 8, kSide = kTile / kPatch, kThreads = kSide * kSide;

__global__ void __launch_bounds__(kThreads) turn_kernel(const __grid_constant__ Fp8Turn p) {
  __shared__ uint2 turned[kTile][kSide];
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const int64_t row = blockIdx.y * static_cast<int64_t>(kTile) + ty * kPatch;
  const int64_t column = blockIdx.x * static_cast<int64_t>(kTile) + tx * kPatch;
  uint2 x[kPatch];
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
    const bool inside = row + i < p.rows && column < p.columns;
    x[i] = inside ? *reinterpret_cast<const uint2*>(p.q + (row + i) * p.columns + column) : uint2{0, 0};
  }
  if (p.scale && threadIdx.x == 0)
    p.scale_t[blockIdx.x * p.scale_t_stride + blockIdx.y] = p.scale[blockIdx.y * p.scale_stride + blockIdx.x];
    // The slot is turned by tx, so that 16 threads of a half-warp meet 16 different banks both ways.
#pragma unroll
  for (int j = 0; j < kPatch; ++j) {
    const unsigned byte = j % 4, both = byte | (byte + 4) << 4;  // of two words
    auto four = [&](int i) {
      auto word = [&](int k) { return j < 4 ? x[i + k].x : x[i + k].y; };
      return __byte_perm(__byte_perm(word(0), word(1), both), __byte_perm(word(2), word(3), both), 0x5410);
    };
    turned[tx * kPatch + j][ty ^ tx] = {four(0), four(4)};
  }
  __syncthreads();
  const int64_t to = blockIdx.y * static_cast<int64_t>(kTile) + tx * kPatch;
  if (to >= p.rows) return;
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
    const int c = i * kSide + ty;
    const int64_t at = blockIdx.x * static_cast<int64_t>(kTile) + c;
    if (at >= p.columns) break;
    *reinterpret_cast<uint2*>(p.q_t + at * p.rows + to) = turned[c][tx ^ (c / kPatch)];
  }
}

}  // namespace

void fp8_turn(const Fp8Turn& p, Stream stream) {
  const dim3 blocks(static_cast<unsigned>((p.columns + kTile - 1) / kTile),
                    static_cast<unsigned>((p.rows + kTile - 1) / kTile));
  turn_kernel<<<blocks, kThreads, 0, native(stream)>>>(p);
  check_launch("fp8_turn");
}

}  // namespace mcore_bridge::cuda
