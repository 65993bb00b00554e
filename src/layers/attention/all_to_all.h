// Context parallelism by heads (DeepSpeed-Ulysses): ranks swap parts of the sequence for heads around the attention.
#pragma once

#include "layers/attention/context_plan.h"

namespace mcore_bridge {

/// [s, b, n, d] of this rank's part, n heads -> [s * cp, b, n / cp, d]: the whole row in natural order, this rank's
/// heads. Backward is the way back.
at::Tensor sequence_to_heads(const at::Tensor& x, const ContextPlanPtr& plan);
/// The inverse.
at::Tensor heads_to_sequence(const at::Tensor& x, const ContextPlanPtr& plan);

}  // namespace mcore_bridge
