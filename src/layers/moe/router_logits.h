// A router's scores of experts before softmax or sigmoid, more precise than the activations they come from.
#pragma once

#include <ATen/core/Tensor.h>

namespace mcore_bridge {

/// x W^T + b computed and returned in `type`, differentiable: x [t, h], weight [experts, h], bias [experts] or
/// undefined; x and the weight need not be of one precision. Keeps x as it came.
at::Tensor router_logits(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::ScalarType type);

}  // namespace mcore_bridge
