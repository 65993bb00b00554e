// Gradients that are partial on each model-parallel rank, made whole.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "layers/module.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {

/// A trainable parameter and its gradient.
struct TrainableParameter {
  std::string name;
  at::Tensor tensor;
  at::Tensor main_grad;  ///< same shape; a GradBuffer's are fp32 views into its buckets
  ParameterTraits traits;
  int chunk = 0;  ///< index of its model chunk
};

/// Sums over tensor ranks what each of them knows a part of, and over the two stages that share an embedding. In place.
/// Collective over the model-parallel ranks; the data-parallel sum is the caller's.
void complete_gradients(const std::vector<TrainableParameter>& parameters, const ParallelState& parallel);

}  // namespace mcore_bridge
