// Blockwise FP8 as DeepSeek and Qwen publish it: a float8_e4m3fn matrix `<name>` and `<name>_scale_inv`, one number per
// block of weight_block_size (128 x 128; blocks at the right and lower edge may be ragged). A weight is its float8
// value times its block's number.
#pragma once

#include <cstdint>

#include "config/quantization.h"

namespace mcore_bridge {

inline int64_t blocks_of(int64_t extent, int64_t block) { return (extent + block - 1) / block; }

/// `values`: rows x cols float8_e4m3fn that begin at (row, col) of their matrix; `scales`: the numbers of the block
/// rows and columns from (row / block.rows, col / block.cols) on, `scale_columns` of them to a row. The product is
/// taken in float.
void dequantize_fp8(const uint8_t* values, int64_t row, int64_t col, int64_t rows, int64_t cols, const float* scales,
                    int64_t scale_columns, BlockSize block, float* to);

/// A block's scale: 1 / (448 / amax), in float, as Transformers' Fp8Quantize computes it; 1 for a block of zeros (or of
/// numbers so small that 448 / amax overflows, which become zeros).
float fp8_scale(float amax);

/// Raises `amax` (one number per block, as `scales` above) to the largest magnitudes among `values`. Returns false when
/// one is not finite.
bool raise_amax(const float* values, int64_t row, int64_t col, int64_t rows, int64_t cols, float* amax,
                int64_t amax_columns, BlockSize block);

/// What a block's values are multiplied with: 448 / amax; 0 when the block becomes zeros.
float fp8_factor(float amax);

/// round(value * its block's factor), the product in float; `factors` as `scales` above.
void quantize_fp8(const float* values, int64_t row, int64_t col, int64_t rows, int64_t cols, const float* factors,
                  int64_t factor_columns, BlockSize block, uint8_t* to);

}  // namespace mcore_bridge
