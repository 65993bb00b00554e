// Gated activations of the MLP.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace mcore_bridge {

enum class Activation { kSilu, kGelu, kGeluTanh };

/// Throws ValueError for a name that is not ModelConfig::hidden_act's.
Activation parse_activation(const std::string& name);

/// act(gate) * up for x = [gate | up] along the last dim. Keeps only x for backward.
at::Tensor gated_activation(const at::Tensor& x, Activation activation);

}  // namespace mcore_bridge
