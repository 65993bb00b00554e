#include "bridge/region_blocks.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

namespace mcore_bridge {

RegionBlock region_block(const HfTensor& tensor, const Region& region, const at::Tensor& parameter) {
  const auto stored = stored_box(tensor, region);
  const auto matrix = parameter.reshape({-1, tensor.vector ? 1 : parameter.size(-1)});
  const auto row = matrix.stride(0), col = matrix.stride(1);
  const auto offset = matrix.storage_offset() + region.row * row + region.col * col;
  const auto turns = region.stretches;
  auto view = turns == 1 ? matrix.as_strided({region.rows, region.cols}, {row, col}, offset)
                         : matrix.as_strided({region.rows / turns, turns, region.cols},
                                             {row, region.stretch * row, col}, offset);
  if (tensor.transposed) view = view.movedim(-1, 0);
  return {{stored.row, stored.col, stored.rows, stored.cols}, view};
}

std::vector<RegionBlock> region_blocks(const HfTensor& tensor, const Region& region, const at::Tensor& parameter,
                                       int64_t block_elements, int64_t unit) {
  std::vector<RegionBlock> blocks;
  const auto stored = stored_box(tensor, region);
  if (stored.rows == 0 || stored.cols == 0) return blocks;
  const auto turns = tensor.transposed ? 1 : region.stretches;  // a cut may not fall between rows that take turns
  const auto step = std::lcm(unit, turns);
  const auto height = std::max<int64_t>(1, block_elements / stored.cols / step) * step;
  for (int64_t first = 0; first < stored.rows;) {
    auto next = (stored.row + first) / step * step + height - stored.row;
    next = std::min(stored.rows, (next + turns - 1) / turns * turns);
    blocks.push_back(region_block(tensor, stored_rows(tensor, region, first, next - first), parameter));
    first = next;
  }
  return blocks;
}

void copy_on_this_thread(const at::Tensor& target, const at::Tensor& source) {
  constexpr int64_t kSerial = 32767;  // elements; ATen parallelises from 32768
  if (target.numel() <= kSerial) {
    target.copy_(source);
    return;
  }
  const auto sizes = target.sizes();
  const auto dim = sizes[0] > 1 ? 0 : std::max_element(sizes.begin(), sizes.end()) - sizes.begin();
  // Whole rows in one go where several fit.
  const auto row = target.numel() / sizes[dim];
  const auto step = dim == 0 && row <= kSerial ? kSerial / row : (sizes[dim] + 1) / 2;
  for (int64_t at = 0; at < sizes[dim]; at += step) {
    const auto some = std::min<int64_t>(step, sizes[dim] - at);
    copy_on_this_thread(target.narrow(dim, at, some), source.narrow(dim, at, some));
  }
}

}  // namespace mcore_bridge
