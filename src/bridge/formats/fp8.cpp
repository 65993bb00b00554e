#include "bridge/formats/fp8.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "bridge/formats/float_bytes.h"

namespace mcore_bridge {
namespace {

constexpr float kLargest = 448.0f;  // of float8_e4m3fn

/// Calls work(index of the block in a row-major grid that begins at the box's first block, first element, count) for
/// the runs of a box that lie in one row and one block.
template <class Work>
void for_each_run(int64_t row, int64_t col, int64_t rows, int64_t cols, int64_t grid_columns, BlockSize block,
                  Work&& work) {
  const auto first_row = row / block.rows, first_col = col / block.cols;
  for (int64_t i = 0; i < rows; ++i) {
    const auto grid = ((row + i) / block.rows - first_row) * grid_columns;
    for (int64_t j = 0; j < cols;) {
      const auto index = (col + j) / block.cols;
      const auto end = std::min(cols, (index + 1) * block.cols - col);
      work(grid + index - first_col, i * cols + j, end - j);
      j = end;
    }
  }
}

}  // namespace

void dequantize_fp8(const uint8_t* values, int64_t row, int64_t col, int64_t rows, int64_t cols, const float* scales,
                    int64_t scale_columns, BlockSize block, float* to) {
  to_float(c10::ScalarType::Float8_e4m3fn, values, to, rows * cols);
  for_each_run(row, col, rows, cols, scale_columns, block, [&](int64_t index, int64_t first, int64_t count) {
    const auto scale = scales[index];
    for (int64_t k = first; k < first + count; ++k) to[k] *= scale;
  });
}

float fp8_factor(float amax) {
  const float factor = amax > 0 ? kLargest / amax : 1.0f;
  return std::isfinite(factor) ? factor : 0.0f;
}

float fp8_scale(float amax) {
  const float factor = fp8_factor(amax);
  return factor > 0 ? 1.0f / factor : 1.0f;
}

bool raise_amax(const float* values, int64_t row, int64_t col, int64_t rows, int64_t cols, float* amax,
                int64_t amax_columns, BlockSize block) {
  bool finite = true;
  for_each_run(row, col, rows, cols, amax_columns, block, [&](int64_t index, int64_t first, int64_t count) {
    float largest = amax[index];
    for (int64_t k = first; k < first + count; ++k) {
      const auto size = std::fabs(values[k]);
      finite &= size <= std::numeric_limits<float>::max();  // false for NaN as well
      largest = std::max(largest, size);
    }
    amax[index] = largest;
  });
  return finite;
}

void quantize_fp8(const float* values, int64_t row, int64_t col, int64_t rows, int64_t cols, const float* factors,
                  int64_t factor_columns, BlockSize block, uint8_t* to) {
  constexpr int64_t kPiece = 512;
  float scaled[kPiece];
  for_each_run(row, col, rows, cols, factor_columns, block, [&](int64_t index, int64_t first, int64_t count) {
    const float factor = factors[index];
    for (int64_t done = 0; done < count; done += kPiece) {
      const auto piece = std::min(kPiece, count - done);
      for (int64_t k = 0; k < piece; ++k)
        scaled[k] = std::clamp(values[first + done + k] * factor, -kLargest, kLargest);
      from_float(c10::ScalarType::Float8_e4m3fn, scaled, to + first + done, piece);
    }
  });
}

}  // namespace mcore_bridge
