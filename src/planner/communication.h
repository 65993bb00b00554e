// The communication of one step, as communication_volume() would count it on one rank.
#pragma once

#include "planner/stage.h"

namespace mcore_bridge {

/// `micro_batches`: of a step and data-parallel rank.
StepTraffic step_traffic(const PlannedStage& stage, const PlanRequest& request, const Topology& topology,
                         int64_t micro_batches);

/// Sum over all operations of a group kind.
int64_t wire_bytes(const StepTraffic& traffic, GroupKind kind);

}  // namespace mcore_bridge
