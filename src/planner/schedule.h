// The pipeline schedule of a run, played on paper.
#pragma once

#include <memory>
#include <vector>

#include "mcore_bridge/model_config.h"
#include "mcore_bridge/schedule.h"

namespace mcore_bridge {

struct PlannedSchedule {
  double idle = 0;             ///< of a step, in units of what a stage does with one micro-batch, forward and backward
  std::vector<int> in_flight;  ///< per stage: most (chunk, micro-batch) pairs between forward and backward
  std::vector<StageSchedule> rows;  ///< of fewer micro-batches where more would only repeat them; computations alone
};

/// What the config's schedule makes of `micro_batches` whose backward takes `backward_cost` times the forward. Kept for
/// the next layout that asks nearly the same.
std::shared_ptr<const PlannedSchedule> plan_schedule(const ModelConfig& config, int64_t micro_batches,
                                                     double backward_cost);

}  // namespace mcore_bridge
