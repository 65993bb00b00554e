// A slice of a flattened local parameter, as boxes: what a sharded optimizer holds, in the plan's terms.
#pragma once

#include "plan/plan.h"

namespace mcore_bridge {

/// The regions of `plan` cut to the elements [begin, end) of the flattened (row-major) local parameter. At most three
/// per region of the plan: the end of a first row, whole rows, the start of a last row; an interleaved region that is
/// cut comes row by row. Positions stay those of the
/// parameter and of the Hugging Face tensors; padding is covered by none. ValueError when the range is no part of the
/// parameter.
std::vector<Region> clip(const ParameterPlan& plan, int64_t begin, int64_t end);

}  // namespace mcore_bridge
