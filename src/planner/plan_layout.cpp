#include <ATen/core/Tensor.h>

#include <algorithm>
#include <map>
#include <memory>

#include "config/pipeline_layout.h"
#include "mcore_bridge/error.h"
#include "planner/communication.h"
#include "planner/explain.h"
#include "planner/memory.h"
#include "planner/schedule.h"
#include "planner/stage.h"
#include "planner/time.h"

namespace mcore_bridge {
namespace {

/// What tells the chunks of two stages apart: how many layers of which kind, and the ends.
std::string role_of(const ModelConfig& config, const std::vector<ChunkLayout>& chunks, int stage) {
  std::string role;
  for (auto chunk = static_cast<size_t>(stage); chunk < chunks.size(); chunk += config.pipeline_model_parallel_size) {
    const auto& [layers, embedding, loss] = chunks[chunk];
    role += std::string("/") + (embedding ? "E" : "");
    for (auto layer = layers.first; layer < layers.first + layers.count; ++layer)
      role += static_cast<char>('0' + (config.has_window(layer) ? 1 : 0) + (config.has_rope(layer) ? 2 : 0) +
                                (config.is_moe_layer(layer) ? 4 : 0));
    role += loss ? "L" : "";
  }
  return role;
}

void check_request(const PlanRequest& request) {
  const auto& run = request.run;
  auto positive = [](const char* name, int64_t value) {
    MCB_CHECK(value > 0, "plan: ", name, " ", value, " must be at least 1");
  };
  positive("gpus", run.processes);
  positive("micro_batch_size", run.micro_batch_size);
  positive("global_batch_size", run.global_batch_size);
  positive("max_length", run.sequence_length);
  positive("documents", request.documents);
  MCB_CHECK(request.hardware.peak_flops > 0 && request.hardware.memory_bandwidth > 0 &&
                request.hardware.link_bandwidth > 0 && request.hardware.network_bandwidth > 0,
            "plan: the hardware's FLOP/s and bandwidths must be positive");
  if (request.lora) request.lora->validate();
  auto optimizer = request.optimizer;
  optimizer.train_iters = std::max<int64_t>(1, optimizer.train_iters);  // the learning rate is not our business
  optimizer.validate();
  check_layout(request.config, run);
}

}  // namespace

Plan plan_layout(const PlanRequest& request) {
  check_request(request);
  const auto& config = request.config;
  auto sizes = config.parallel_sizes();
  const Topology topology(sizes, static_cast<int>(request.run.processes));
  sizes = topology.sizes();
  Plan plan;
  plan.layout = layout_of(config, request.run);
  plan.sequence_parallel = config.sequence_parallel;
  plan.recompute = config.recompute_granularity.value_or("none");
  plan.micro_batches = request.run.global_batch_size / (request.run.micro_batch_size * sizes.data);

  PlannedStages stages;
  std::map<std::string, std::shared_ptr<const PlannedStage>> built;
  const auto layout = pipeline_layout(config);
  for (int stage = 0; stage < sizes.pipeline; ++stage) {
    const auto role = role_of(config, layout, stage);
    auto& planned = built[role];
    if (!planned) planned = std::make_shared<const PlannedStage>(plan_stage(request, topology, stage));
    stages.push_back(planned);
  }
  const auto slowest = stage_time(*stages.back(), request);
  const auto schedule = plan_schedule(config, plan.micro_batches, slowest.backward / slowest.forward);
  double flops = 0;
  std::map<const PlannedStage*, StepTraffic> traffic;
  for (int i = 0; i < sizes.pipeline; ++i) {
    const auto& stage = *stages[static_cast<size_t>(i)];
    StageEstimate estimate;
    estimate.stage = i;
    estimate.layers = layout[static_cast<size_t>(i)].layers;
    for (const auto& chunk : stage.chunks) {
      for (const auto& segment : chunk.segments) flops -= segment.footprint.recomputed_flops;
    }
    estimate.parameters = stage.buffers.parameters;
    estimate.trainable = stage.buffers.trainable;
    estimate.in_flight = schedule->in_flight.at(static_cast<size_t>(i));
    estimate.memory = estimate_memory(stage, request, sizes, schedule->rows.at(static_cast<size_t>(i)));
    auto& counted = traffic[&stage];
    if (counted.empty()) counted = step_traffic(stage, request, topology, plan.micro_batches);
    estimate.traffic = counted;
    estimate.forward_flops = stage.forward_flops();
    estimate.backward_flops = stage.backward_flops();
    flops += estimate.forward_flops + estimate.backward_flops;
    plan.stages.push_back(std::move(estimate));
    if (plan.stages.back().memory.total() > plan.worst_stage().memory.total()) plan.worst = i;
  }
  plan.time =
      estimate_time(request, topology, stages, plan.stages, plan.micro_batches, *schedule, plan.bubble_fraction);
  plan.model_flops = flops * static_cast<double>(plan.micro_batches * sizes.tensor * sizes.context * sizes.data);
  const auto tokens = static_cast<double>(request.run.global_batch_size * request.run.sequence_length);
  plan.tokens_per_second = tokens / plan.time.step();
  plan.mfu =
      plan.model_flops / plan.time.step() / static_cast<double>(topology.world_size()) / request.hardware.peak_flops;
  const double memory = request.memory > 0 ? request.memory : request.hardware.memory;
  plan.fits = static_cast<double>(plan.worst_stage().memory.total()) <= memory;
  plan.explanation = explain(plan, request, *stages[static_cast<size_t>(plan.worst)], sizes);
  return plan;
}

}  // namespace mcore_bridge
