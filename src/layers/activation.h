// Gated activations of the MLP.
#pragma once

#include <string>

#include "kernels/gated_activation.h"

namespace mcore_bridge {

/// Throws ValueError for a name that is not ModelConfig::hidden_act's.
Activation parse_activation(const std::string& name);

/// act(gate) * up for x = [gate | up] along the last dim, for autograd. Keeps only x for backward.
at::Tensor gated_activation(const at::Tensor& x, Activation activation);

}  // namespace mcore_bridge
