// Blockwise FP8 as DeepSeek and Qwen publish it: a float8_e4m3fn matrix `<name>` and `<name>_scale_inv`, one number per
// block of weight_block_size (128 x 128; blocks at the right and lower edge may be ragged). A weight is its float8 value
// times its block's number.
#pragma once

#include <cstdint>

namespace mcore_bridge {

struct BlockSize {
  int64_t rows = 128, cols = 128;
  bool operator==(const BlockSize&) const = default;
};

inline int64_t blocks_of(int64_t extent, int64_t block) { return (extent + block - 1) / block; }

/// `values`: rows x cols float8_e4m3fn that begin at (row, col) of their matrix; `scales`: the numbers of the block
/// rows and columns from (row / block.rows, col / block.cols) on, `scale_columns` of them to a row. The product is taken
/// in float.
void dequantize_fp8(const uint8_t* values, int64_t row, int64_t col, int64_t rows, int64_t cols, const float* scales,
                    int64_t scale_columns, BlockSize block, float* to);

/// Quantises whole block rows: `from` is rows x cols with rows a multiple of block.rows (or the matrix's end). scale =
/// 1 / (448 / amax) and value = round(from * (448 / amax)), in float, as Transformers' Fp8Quantize computes them; a
/// block of zeros has scale 1. Returns false when a number is not finite.
bool quantize_fp8(const float* from, int64_t rows, int64_t cols, BlockSize block, uint8_t* values, float* scales);

}  // namespace mcore_bridge
