// A region of the plan as pieces of a few MiB: a box of the stored tensor beside the view of the parameter it fills.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "bridge/tensor_source.h"
#include "plan/plan.h"

namespace mcore_bridge {

struct RegionBlock {
  Box box;          ///< of the stored tensor, seen as a matrix of stored_columns()
  at::Tensor view;  ///< of the parameter; its elements in order are the box's, row after row (2-D or 3-D)
};

/// Cuts `region` along the stored tensor's rows into blocks of about `block_elements`, at multiples of `unit` of these
/// rows where it can be. `parameter`: the whole local parameter. Empty regions give no block.
std::vector<RegionBlock> region_blocks(const HfTensor& tensor, const Region& region, const at::Tensor& parameter,
                                       int64_t block_elements, int64_t unit = 1);

/// The whole region as one block.
RegionBlock region_block(const HfTensor& tensor, const Region& region, const at::Tensor& parameter);

/// target.copy_(source) of CPU tensors of one shape on this thread alone (ATen would start a team of threads each
/// time).
void copy_on_this_thread(const at::Tensor& target, const at::Tensor& source);

}  // namespace mcore_bridge
