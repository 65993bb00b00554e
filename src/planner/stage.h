// One pipeline stage's rank on paper: the chunks it would hold, built on the meta device, and what they cost.
#pragma once

#include <memory>
#include <vector>

#include "mcore_bridge/planner.h"
#include "models/gpt_model.h"
#include "planner/buffers.h"

namespace mcore_bridge {

struct PlannedChunk {
  ChunkPlace place;
  std::vector<ManagedParameter> parameters;  ///< meta tensors, trainable as training would set it
  std::vector<GPTModel::Segment> segments;
  std::shared_ptr<const GPTModel> model;  ///< whose layers `parameters` point to
};

struct PlannedStage {
  std::vector<PlannedChunk> chunks;
  PlannedBuffers buffers;
  int64_t summed_loads = 0;  ///< experts whose loads are summed once a step
  int64_t boundary = 0;      ///< bytes of the hidden states that cross a stage boundary, per micro-batch
  double forward_flops() const;
  double backward_flops() const;

 private:
  double flops(double Footprint::*kind) const;
};

/// By pipeline stage; stages that hold alike share one.
using PlannedStages = std::vector<std::shared_ptr<const PlannedStage>>;

/// The micro-batch every rank of the layout works on.
ActivationShape activation_shape(const PlanRequest& request);

/// Tensor rank 0 of pipeline stage `stage`.
PlannedStage plan_stage(const PlanRequest& request, const Topology& topology, int stage);

}  // namespace mcore_bridge
