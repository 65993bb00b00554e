#include "plan/clip.h"

#include <algorithm>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// Rows and columns [first, last) of the local parameter.
struct Window {
  int64_t first_row, last_row, first_col, last_col;
};

/// A range of a row-major matrix with `cols` columns as at most three windows, in order.
std::vector<Window> windows(int64_t begin, int64_t end, int64_t cols) {
  std::vector<Window> result;
  auto add = [&](int64_t first_row, int64_t last_row, int64_t first_col, int64_t last_col) {
    if (first_row < last_row && first_col < last_col) result.push_back({first_row, last_row, first_col, last_col});
  };
  const auto first = begin / cols, last = end / cols;
  if (first == last) {
    add(first, first + 1, begin % cols, end % cols);
    return result;
  }
  const bool starts_inside = begin % cols != 0;
  if (starts_inside) add(first, first + 1, begin % cols, cols);
  add(first + (starts_inside ? 1 : 0), last, 0, cols);
  add(last, last + 1, 0, end % cols);
  return result;
}

/// The part of a region (without stretches) that lies in a window.
void add_part(std::vector<Region>& result, const Region& region, const Window& window) {
  const auto row = std::max(region.row, window.first_row), col = std::max(region.col, window.first_col);
  const auto rows = std::min(region.row + region.rows, window.last_row) - row;
  const auto columns = std::min(region.col + region.cols, window.last_col) - col;
  if (rows <= 0 || columns <= 0) return;
  auto part = region;
  part.hf_row += row - region.row;
  part.hf_col += col - region.col;
  part.row = row;
  part.col = col;
  part.rows = rows;
  part.cols = columns;
  result.push_back(part);
}

/// Whether the flat range holds all of a region.
bool holds(const Region& region, int64_t begin, int64_t end, int64_t cols) {
  const auto last_row = region.parameter_row(region.rows - 1);
  return begin <= region.row * cols + region.col && last_row * cols + region.col + region.cols <= end;
}

/// An interleaved region row by row: a part of it is no box of the Hugging Face tensor.
std::vector<Region> single_rows(const Region& region) {
  std::vector<Region> result;
  for (int64_t i = 0; i < region.rows; ++i) {
    auto row = region;
    row.hf_row += i;
    row.row = region.parameter_row(i);
    row.rows = 1;
    row.stretches = 1;
    row.stretch = 0;
    result.push_back(row);
  }
  return result;
}

}  // namespace

std::vector<Region> clip(const ParameterPlan& plan, int64_t begin, int64_t end) {
  const auto cols = plan.columns();
  int64_t count = 1;
  for (const auto size : plan.sizes) count *= size;
  MCB_CHECK(0 <= begin && begin <= end && end <= count, "clip: [", begin, ", ", end, ") is no part of ", plan.name,
            ", which has ", count, " elements");
  std::vector<Region> result;
  if (begin == end) return result;
  const auto cuts = windows(begin, end, cols);
  for (const auto& region : plan.regions) {
    if (region.rows == 0 || region.cols == 0) continue;
    if (holds(region, begin, end, cols)) {
      result.push_back(region);
    } else {
      const auto parts = region.stretches == 1 ? std::vector{region} : single_rows(region);
      for (const auto& part : parts) {
        for (const auto& window : cuts) add_part(result, part, window);
      }
    }
  }
  return result;
}

}  // namespace mcore_bridge
