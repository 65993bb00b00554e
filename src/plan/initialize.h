// Random initialisation that depends on (seed, Hugging Face name, index) alone.
#pragma once

#include <ATen/core/Tensor.h>

#include "plan/plan.h"

namespace mcore_bridge {

/// Fills a local parameter as its rule's `init` says. Every element is a function of the seed, the name of the Hugging
/// Face tensor it belongs to and its flat index there, so all layouts agree; padding becomes zero. `std`: of kNormal
/// and kScaledNormal (the latter divides by sqrt(2 * layers)).
void initialize_parameter(at::Tensor parameter, const ParameterPlan& plan, uint64_t seed, double std, int64_t layers);

}  // namespace mcore_bridge
