#include "planner/schedule.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

namespace mcore_bridge {
namespace {

constexpr double kSteps = 2;  // backward costs are told apart in so many steps of a forward

/// After one whole group (of several chunks: two) and the odd one a schedule repeats itself.
int played(int64_t micro_batches, int64_t group, int64_t chunks) {
  const auto whole = chunks > 1 ? 2 : 1;
  return static_cast<int>(micro_batches < (whole + 1) * group ? micro_batches : whole * group + micro_batches % group);
}

/// Most (chunk, micro-batch) pairs between forward and the end of backward.
int in_flight(const StageSchedule& row) {
  int alive = 0, most = 0;
  for (const auto& action : row) {
    if (action.kind == Action::Kind::kForward) most = std::max(most, ++alive);
    if (action.kind == Action::Kind::kBackward || action.kind == Action::Kind::kBackwardWeight) --alive;
  }
  return most;
}

PlannedSchedule play(const ScheduleOptions& options, double backward_cost) {
  PlannedSchedule result{.rows = schedule_order(options)};
  for (const auto& row : result.rows) result.in_flight.push_back(in_flight(row));
  if (options.name != "zb-h1" && options.micro_batches >= options.stages) {
    // What the simulator gives too (schedule_test), only sooner.
    result.idle = static_cast<double>(options.stages - 1) / options.chunks;
    return result;
  }
  const ChunkCost cost{.forward = 1, .backward_input = backward_cost / 2, .backward_weight = backward_cost / 2};
  const auto simulation = simulate(make_schedule(options), {.chunks = {cost}});
  const double work = options.micro_batches * (1 + backward_cost);
  result.idle = (work / (1 - simulation.bubble_fraction) - work) / (1 + backward_cost);
  return result;
}

}  // namespace

std::shared_ptr<const PlannedSchedule> plan_schedule(const ModelConfig& config, int64_t micro_batches,
                                                     double backward_cost) {
  const auto stages = config.pipeline_model_parallel_size;
  const auto group = config.microbatch_group_size_per_vp_stage.value_or(stages);
  const ScheduleOptions options{.name = config.pipeline_schedule,
                                .stages = static_cast<int>(stages),
                                .chunks = static_cast<int>(config.virtual_stages()),
                                .micro_batches = played(micro_batches, group, config.virtual_stages()),
                                .group_size = static_cast<int>(config.microbatch_group_size_per_vp_stage.value_or(0))};
  const double cost = std::max(1.0, std::round(backward_cost * kSteps)) / kSteps;
  using Key = std::tuple<std::string, int, int, int, int, double>;
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<const PlannedSchedule>> known;
  const Key key{options.name, options.stages, options.chunks, options.micro_batches, options.group_size, cost};
  const std::lock_guard<std::mutex> lock(mutex);
  auto& schedule = known[key];
  if (!schedule) schedule = std::make_shared<const PlannedSchedule>(play(options, cost));
  return schedule;
}

}  // namespace mcore_bridge
