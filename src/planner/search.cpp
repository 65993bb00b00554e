#include <c10/core/ScalarType.h>

#include <algorithm>

#include "mcore_bridge/error.h"
#include "mcore_bridge/planner.h"
#include "train/sharded_optimizer.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kMicroBatches[] = {1, 2, 4, 8, 16};
constexpr int64_t kMostChunks = 8;  // more virtual stages send more and idle hardly less

/// Whether the batch and the sequence can be cut as the layout asks.
bool run_fits(const Layout& layout, int64_t micro_batch, const RunSizes& run, bool sequence_parallel) {
  const auto pieces = (layout.context > 1 ? 2 * layout.context : 1) * (sequence_parallel ? layout.tensor : 1);
  return run.global_batch_size % (micro_batch * layout.data()) == 0 && run.sequence_length % pieces == 0;
}

/// Tensor ranks of a mixture of experts must not route the same tokens.
void with_split_tokens(ModelConfig& config) {
  if (config.is_moe()) config.sequence_parallel = true;  // none where there is one tensor rank
}

bool better(const Plan& a, const Plan& b) {
  if (a.fits != b.fits) return a.fits;
  if (a.fits) return a.tokens_per_second > b.tokens_per_second;
  return a.worst_stage().memory.total() < b.worst_stage().memory.total();
}

}  // namespace

namespace {

/// Layouts of the sizes that are not fixed, any batch and sequence.
std::vector<Layout> candidate_layouts(const PlanRequest& request, const Fixed& fixed) {
  const auto asked = layout_of(request.config, request.run);
  auto run = request.run;
  run.global_batch_size = run.sequence_length = 0;  // checked below, once per micro-batch size
  auto config = request.config;
  if (!fixed.sequence_parallel) with_split_tokens(config);
  std::vector<Layout> result;
  for (const auto& layout : possible_layouts(config, run)) {
    if ((fixed.tensor && layout.tensor != asked.tensor) || (fixed.pipeline && layout.pipeline != asked.pipeline) ||
        (fixed.virtual_pipeline && layout.virtual_pipeline != asked.virtual_pipeline) ||
        (fixed.context && layout.context != asked.context) || (fixed.expert && layout.expert != asked.expert))
      continue;
    if (!fixed.virtual_pipeline && layout.virtual_pipeline > kMostChunks) continue;
    // Counting embedding and loss as layers is for layers that do not divide otherwise.
    if (layout.account != asked.account && request.config.num_layers % (layout.pipeline * layout.virtual_pipeline) == 0)
      continue;
    result.push_back(layout);
  }
  return result;
}

/// Plans of one layout: the micro-batches and recomputations that are not fixed.
void plan_runs(const PlanRequest& request, const Fixed& fixed, const Layout& layout, std::vector<Plan>& plans) {
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

/// Whether a layout of a mixture of experts is worth a plan: experts multiply the layouts, and most cannot be good.
bool promising(const PlanRequest& request, const Fixed& fixed, const Layout& l) {
  const auto& config = request.config;
  // A rank's part of a row, and tensor ranks of one node.
  constexpr int64_t kFewestTokens = 512;
  if (!fixed.tensor && l.tensor > request.hardware.gpus_per_node) return false;
  const auto pieces = (fixed.tensor ? 1 : l.tensor) * (fixed.context ? 1 : l.context);
  if (pieces > 1 && request.run.sequence_length / pieces < kFewestTokens) return false;
  // The experts' weights alone, and their gradients where they are whole on every rank.
  const auto sharding = buffer_options(request.optimizer).sharding;
  if (sharding == Sharding::kParameters) return true;
  double layers = 0;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) layers += config.is_moe_layer(layer) ? 1 : 0;
  const auto slices = config.expert_tensor_parallel_size.value_or(l.tensor);
  const auto parameters = layers * static_cast<double>(3 * *config.num_moe_experts * config.hidden_size) *
                          static_cast<double>(config.moe_ffn_size()) /
                          static_cast<double>(l.pipeline * l.expert * slices);
  const bool all_learn = !request.lora && request.frozen.empty() && sharding < Sharding::kGradients;
  const double bytes = static_cast<double>(c10::elementSize(config.params_dtype)) + (all_learn ? 2 : 0);
  return parameters * bytes <= (request.memory > 0 ? request.memory : request.hardware.memory);
}

}  // namespace

std::vector<Plan> search_layouts(const PlanRequest& request, const Fixed& fixed, int count) {
  const auto layouts = candidate_layouts(request, fixed);
  std::vector<Plan> plans;
  if (!request.config.is_moe()) {
    for (const auto& layout : layouts) plan_runs(request, fixed, layout, plans);
  } else {
    // Virtual stages are tried where a layout without them is among the best.
    constexpr size_t kBest = 8;
    std::vector<const Layout*> later, unpromising;
    for (const auto& layout : layouts) {
      if (!promising(request, fixed, layout)) {
        unpromising.push_back(&layout);
      } else if (layout.virtual_pipeline > 1 && !fixed.virtual_pipeline) {
        later.push_back(&layout);
      } else {
        plan_runs(request, fixed, layout, plans);
      }
    }
    std::stable_sort(plans.begin(), plans.end(), better);
    std::vector<Layout> best;
    for (const auto& plan : plans) {
      auto layout = plan.layout;
      layout.run = {};
      if (best.size() < kBest && plan.fits && std::find(best.begin(), best.end(), layout) == best.end())
        best.push_back(layout);
    }
    for (const auto* layout : later) {
      const bool near = std::any_of(best.begin(), best.end(), [&](const Layout& other) {
        return other.tensor == layout->tensor && other.pipeline == layout->pipeline &&
               other.context == layout->context && other.expert == layout->expert;
      });
      if (near) plan_runs(request, fixed, *layout, plans);
    }
    if (plans.empty()) {
      for (const auto* layout : unpromising) plan_runs(request, fixed, *layout, plans);
    }
  }
  MCB_CHECK(!plans.empty(), "plan: no layout of ", request.run.processes, " GPUs works with the sizes given; ",
            "the nearest: ", [&] {
              const auto nearest = nearest_layouts(request.config, request.run);
              const auto asked = layout_of(request.config, request.run);
              return nearest.empty() ? std::string("none") : layout_changes(nearest[0], asked);
            }());
  std::stable_sort(plans.begin(), plans.end(), better);
  if (static_cast<int>(plans.size()) > count) plans.resize(static_cast<size_t>(count));
  return plans;
}

std::optional<Plan> nearest_fitting(const PlanRequest& request) {
  constexpr int kLayouts = 64;
  auto config = request.config;
  with_split_tokens(config);
  for (const auto& layout : nearest_layouts(config, request.run, kLayouts)) {
    for (const bool recompute : {false, true}) {
      for (auto rows = request.run.micro_batch_size; rows >= 1; rows = rows > 1 ? rows / 2 : 0) {
        if (layout.run.global_batch_size % (rows * layout.data()) != 0) continue;
        auto candidate = request;
        candidate.config = with_layout(config, layout);
        candidate.config.sequence_parallel = config.sequence_parallel && layout.tensor > 1;
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
