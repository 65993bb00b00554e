#include "bridge/formats/fp8.h"

#include <algorithm>
#include <cmath>

#include "bridge/formats/float_bytes.h"

namespace mcore_bridge {
namespace {

constexpr float kLargest = 448.0f;  // of float8_e4m3fn

}  // namespace

void dequantize_fp8(const uint8_t* values, int64_t row, int64_t col, int64_t rows, int64_t cols, const float* scales,
                    int64_t scale_columns, BlockSize block, float* to) {
  to_float(c10::ScalarType::Float8_e4m3fn, values, to, rows * cols);
  const auto first_row = row / block.rows, first_col = col / block.cols;
  for (int64_t i = 0; i < rows; ++i) {
    const auto* scale = scales + ((row + i) / block.rows - first_row) * scale_columns;
    auto* out = to + i * cols;
    for (int64_t j = 0; j < cols;) {
      const auto index = (col + j) / block.cols;
      const auto end = std::min(cols, (index + 1) * block.cols - col);
      const auto factor = scale[index - first_col];
      for (; j < end; ++j) out[j] *= factor;
    }
  }
}

bool quantize_fp8(const float* from, int64_t rows, int64_t cols, BlockSize block, uint8_t* values, float* scales) {
  const auto columns = blocks_of(cols, block.cols);
  float buffer[512];
  for (int64_t top = 0; top < rows; top += block.rows) {
    const auto bottom = std::min(rows, top + block.rows);
    for (int64_t index = 0; index < columns; ++index) {
      const auto left = index * block.cols, right = std::min(cols, left + block.cols);
      float amax = 0;
      bool finite = true;
      for (int64_t i = top; i < bottom; ++i) {
        for (int64_t j = left; j < right; ++j) {
          const auto size = std::fabs(from[i * cols + j]);
          finite &= size <= 3.4028235e38f;  // false for NaN as well
          amax = std::max(amax, size);
        }
      }
      if (!finite) return false;
      const float factor = amax > 0 ? kLargest / amax : 1.0f;
      // A block of subnormal numbers only: 448 / amax overflows, and its values round to zero at any scale kept.
      const bool usable = std::isfinite(factor);
      scales[top / block.rows * columns + index] = usable ? 1.0f / factor : 1.0f;
      for (int64_t i = top; i < bottom; ++i) {
        for (int64_t j = left; j < right; j += 512) {
          const auto count = std::min<int64_t>(512, right - j);
          for (int64_t k = 0; k < count; ++k)
            buffer[k] = usable ? std::clamp(from[i * cols + j + k] * factor, -kLargest, kLargest) : 0.0f;
          from_float(c10::ScalarType::Float8_e4m3fn, buffer, values + i * cols + j, count);
        }
      }
    }
  }
  return true;
}

}  // namespace mcore_bridge
