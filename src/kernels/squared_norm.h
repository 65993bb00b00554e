// The sum of squares of many tensors in one pass over their memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace mcore_bridge {

/// float64 scalar on the tensors' device. At least one tensor; contiguous, of any precisions; summed in fp32 by pieces.
at::Tensor squared_norm(const std::vector<at::Tensor>& tensors);

}  // namespace mcore_bridge
