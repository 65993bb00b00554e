// Gated activations of the MLP.
#pragma once

#include <string>

#include "kernels/gated_activation.h"
#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// Throws ValueError for a name that is not ModelConfig::hidden_act's.
Activation parse_activation(const std::string& name);

/// The gated MLP's activation with its clamp and offset.
GatedOptions gated_options(const ModelConfig& config);

/// act(gate) * up for x = [gate | up] along the last dim, for autograd. Keeps only x for backward.
at::Tensor gated_activation(const at::Tensor& x, const GatedOptions& options);

}  // namespace mcore_bridge
