#include "planner/stage.h"

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>

#include "mcore_bridge/bridge.h"
#include "parallel/parallel_state.h"
#include "train/shard_quantizer.h"

namespace mcore_bridge {

double PlannedStage::flops(double Footprint::*kind) const {
  double sum = 0;
  for (const auto& chunk : chunks) {
    for (const auto& segment : chunk.segments) sum += segment.footprint.*kind;
  }
  return sum;
}

double PlannedStage::forward_flops() const { return flops(&Footprint::forward_flops); }
double PlannedStage::backward_flops() const { return flops(&Footprint::backward_flops); }

ActivationShape activation_shape(const PlanRequest& request) {
  const auto context = request.config.context_parallel_size;
  return {.sequence = request.run.sequence_length / context,
          .batch = request.run.micro_batch_size,
          .element = static_cast<int64_t>(c10::elementSize(request.config.params_dtype)),
          .documents = request.documents,
          .context = context,
          .fused = request.gpu_kernels};
}

PlannedStage plan_stage(const PlanRequest& request, const Topology& topology, int stage) {
  const auto& config = request.config;
  const auto parallel = ParallelState::planned(topology, topology.rank_of(0, 0, 0, stage));
  const auto shape = activation_shape(request);
  PlannedStage result;
  result.boundary =
      shape.tokens() / (config.sequence_parallel ? topology.sizes().tensor : 1) * config.hidden_size * shape.element;
  std::vector<ManagedParameter> all;
  int64_t beside = 0;  // bytes that layers keep beside their parameters
  for (int vp_stage = 0; vp_stage < config.virtual_stages(); ++vp_stage) {
    Chunks chunk{build_model(config, parallel, vp_stage, "meta")};
    if (request.lora) add_lora(chunk, *request.lora);
    for (auto& parameter : chunk[0]->named_parameters()) {
      for (const auto& prefix : request.frozen) {
        if (parameter.name.starts_with(prefix)) parameter.tensor.set_requires_grad(false);
      }
    }
    for (const auto& linear : chunk[0]->linears()) {
      const auto& layer = *linear.layer;
      if (layer.fp8()) beside += layer.fp8()->weight_bytes(layer.weight().numel());
      if (request.gpu_kernels) beside += layer.room() * layer.weight().size(0) * shape.element;
    }
    auto parameters = managed_parameters(chunk);
    for (auto& parameter : parameters) parameter.chunk = vp_stage;
    all.insert(all.end(), parameters.begin(), parameters.end());
    for (const auto* router : chunk[0]->routers()) result.summed_loads += router->summed_loads();
    result.chunks.push_back({chunk[0]->place(), std::move(parameters), chunk[0]->segments(shape), chunk[0]});
  }
  check_fp8_param(all, request.optimizer);
  result.buffers = plan_buffers(all, *parallel, request.optimizer);
  // The output matrix's gradient is made in forward, in fp32: in its main gradient, or beside it when that is less
  // precise; where there is none because gradients are sharded, it waits for backward.
  const bool none = result.buffers.sharding >= Sharding::kGradients, narrow = result.buffers.grad_element < 4;
  if (auto& last = result.chunks.back(); last.place.post_process && (none || narrow)) {
    const auto matrix = std::find_if(last.parameters.rbegin(), last.parameters.rend(),
                                     [](const auto& p) { return p.trainable && p.traits.vocabulary; });
    if (matrix != last.parameters.rend()) {
      auto& head = last.segments.back().footprint;
      if (none) {
        head.saved += static_cast<int64_t>(matrix->tensor.nbytes());
      } else {
        head.workspace += matrix->tensor.numel() * 4;
      }
    }
  }
  if (result.buffers.sharding != Sharding::kParameters) result.buffers.weights += beside;
  return result;
}

}  // namespace mcore_bridge
