// An estimate of a step's time: a roofline, not a measurement.
#pragma once

#include "planner/schedule.h"
#include "planner/stage.h"

namespace mcore_bridge {

/// Seconds of one micro-batch on one stage, all its chunks.
struct StageTime {
  double forward = 0, backward = 0;
};
StageTime stage_time(const PlannedStage& stage, const PlanRequest& request);

/// Bandwidth between ranks of which the farthest are `span` global ranks apart.
double bandwidth(const Hardware& hardware, int64_t span);

/// `stages`: all; `traffic` and `trainable`: of the stage with the most of each.
TimeEstimate estimate_time(const PlanRequest& request, const Topology& topology, const PlannedStages& stages,
                           const std::vector<StageEstimate>& estimates, int64_t micro_batches,
                           const PlannedSchedule& schedule, double& bubble_fraction);

}  // namespace mcore_bridge
