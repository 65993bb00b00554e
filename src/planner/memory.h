// The memory of one rank, summed up from what the engine would allocate.
#pragma once

#include "mcore_bridge/schedule.h"
#include "planner/stage.h"

namespace mcore_bridge {

/// `row`: the stage's computations in their order.
MemoryEstimate estimate_memory(const PlannedStage& stage, const PlanRequest& request, const ParallelSizes& sizes,
                               const StageSchedule& row);

}  // namespace mcore_bridge
