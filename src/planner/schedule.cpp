#include "planner/schedule.h"

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

PlannedSchedule play(const ScheduleOptions& options, double backward_cost) {
  PlannedSchedule result{.rows = make_schedule(options)};
  const ChunkCost cost{.forward = 1, .backward_input = backward_cost / 2, .backward_weight = backward_cost / 2};
  const auto simulation = simulate(result.rows, {.chunks = {cost}});
  const double work = options.micro_batches * (1 + backward_cost);
  result.idle = (work / (1 - simulation.bubble_fraction) - work) / (1 + backward_cost);
  result.in_flight = simulation.peak_activations;
  for (auto& row : result.rows) std::erase_if(row, [](const Action& action) { return !action.computes(); });
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
