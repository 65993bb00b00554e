#include <algorithm>

#include "mcore_bridge/error.h"
#include "mcore_bridge/planner.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kMicroBatches[] = {1, 2, 4, 8, 16};
constexpr int64_t kMostChunks = 8;  // more virtual stages send more and idle hardly less

/// Whether the batch and the sequence can be cut as the layout asks.
bool run_fits(const Layout& layout, int64_t micro_batch, const RunSizes& run, bool sequence_parallel) {
  const auto pieces = (layout.context > 1 ? 2 * layout.context : 1) * (sequence_parallel ? layout.tensor : 1);
  return run.global_batch_size % (micro_batch * layout.data()) == 0 && run.sequence_length % pieces == 0;
}

bool better(const Plan& a, const Plan& b) {
  if (a.fits != b.fits) return a.fits;
  if (a.fits) return a.tokens_per_second > b.tokens_per_second;
  return a.worst_stage().memory.total() < b.worst_stage().memory.total();
}

}  // namespace

std::vector<Plan> search_layouts(const PlanRequest& request, const Fixed& fixed, int count) {
  const auto asked = layout_of(request.config, request.run);
  auto run = request.run;
  run.global_batch_size = run.sequence_length = 0;  // checked below, once per micro-batch size
  auto config = request.config;
  if (config.is_moe() && !fixed.sequence_parallel) config.sequence_parallel = true;  // what TP needs there
  std::vector<Plan> plans;
  for (const auto& layout : possible_layouts(config, run)) {
    if ((fixed.tensor && layout.tensor != asked.tensor) || (fixed.pipeline && layout.pipeline != asked.pipeline) ||
        (fixed.virtual_pipeline && layout.virtual_pipeline != asked.virtual_pipeline) ||
        (fixed.context && layout.context != asked.context) || (fixed.expert && layout.expert != asked.expert))
      continue;
    if (!fixed.virtual_pipeline && layout.virtual_pipeline > kMostChunks) continue;
    // Counting embedding and loss as layers is for layers that do not divide otherwise.
    if (layout.account != asked.account && request.config.num_layers % (layout.pipeline * layout.virtual_pipeline) == 0)
      continue;
    for (const auto micro_batch : kMicroBatches) {
      const auto rows = fixed.micro_batch ? request.run.micro_batch_size : micro_batch;
      bool sequence_parallel = fixed.sequence_parallel ? request.config.sequence_parallel : true;
      sequence_parallel = sequence_parallel && layout.tensor > 1;
      if (!run_fits(layout, rows, request.run, sequence_parallel)) {
        if (fixed.micro_batch) break;
        continue;
      }
      for (const char* recompute : {"none", "full"}) {
        auto candidate = request;
        candidate.config = with_layout(request.config, layout);
        candidate.config.sequence_parallel = sequence_parallel;
        candidate.run.micro_batch_size = rows;
        // What is computed again cannot be offloaded.
        if (!fixed.recompute && recompute == std::string("full") && request.config.cpu_offloading) continue;
        if (!fixed.recompute) {
          candidate.config.recompute_granularity = recompute;
          candidate.config.recompute_method = {};
          candidate.config.recompute_num_layers = {};
        }
        plans.push_back(plan_layout(candidate));
        if (fixed.recompute) break;
      }
      // What is too big already is so with more rows.
      if (fixed.micro_batch || !plans.back().fits) break;
    }
  }
  MCB_CHECK(!plans.empty(), "plan: no layout of ", request.run.processes, " GPUs works with the sizes given; ",
            "the nearest: ", [&] {
              const auto nearest = nearest_layouts(request.config, request.run);
              return nearest.empty() ? std::string("none") : layout_changes(nearest[0], asked);
            }());
  std::stable_sort(plans.begin(), plans.end(), better);
  if (static_cast<int>(plans.size()) > count) plans.resize(static_cast<size_t>(count));
  return plans;
}

std::optional<Plan> nearest_fitting(const PlanRequest& request) {
  constexpr int kLayouts = 64;
  for (const auto& layout : nearest_layouts(request.config, request.run, kLayouts)) {
    for (const bool recompute : {false, true}) {
      for (auto rows = request.run.micro_batch_size; rows >= 1; rows = rows > 1 ? rows / 2 : 0) {
        if (layout.run.global_batch_size % (rows * layout.data()) != 0) continue;
        auto candidate = request;
        candidate.config = with_layout(request.config, layout);
        candidate.run = layout.run;
        candidate.run.micro_batch_size = rows;
        if (recompute) {
          candidate.config.recompute_granularity = "full";
          candidate.config.recompute_method = {};
          candidate.config.recompute_num_layers = {};
        }
        auto plan = plan_layout(candidate);
        if (plan.fits) return plan;
      }
    }
  }
  return {};
}

}  // namespace mcore_bridge
