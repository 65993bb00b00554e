// The formulae of a plan with its numbers filled in.
#pragma once

#include "planner/stage.h"

namespace mcore_bridge {

/// `stage`: the one with the most memory.
std::vector<std::pair<std::string, std::string>> explain(const Plan& plan, const PlanRequest& request,
                                                         const PlannedStage& stage, const ParallelSizes& sizes);

}  // namespace mcore_bridge
