#include "planner/time.h"

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "planner/communication.h"

namespace mcore_bridge {

StageTime stage_time(const PlannedStage& stage, const PlanRequest& request) {
  const auto& hardware = request.hardware;
  const double flops = hardware.peak_flops * hardware.matmul_efficiency;
  const double bytes = hardware.memory_bandwidth * hardware.bandwidth_efficiency;
  double forward_bytes = 0, backward_bytes = 0;
  for (const auto& chunk : stage.chunks) {
    for (const auto& segment : chunk.segments) {
      // Element-wise passes write and read what is kept; backward reads it and moves gradients of the same size.
      const auto produced = static_cast<double>(segment.produced);
      forward_bytes += 2 * produced;
      backward_bytes += (segment.footprint.recomputed_flops > 0 ? 6 : 4) * produced;
    }
    for (const auto& parameter : chunk.parameters) {
      const auto size = static_cast<double>(parameter.tensor.nbytes());
      forward_bytes += size;
      backward_bytes += size;
      // Its gradient is written, read, and added to the fp32 buffer.
      if (parameter.trainable) backward_bytes += 2 * size + 8 * static_cast<double>(parameter.tensor.numel());
    }
  }
  return {stage.forward_flops() / flops + forward_bytes / bytes,
          stage.backward_flops() / flops + backward_bytes / bytes};
}

double bandwidth(const Hardware& hardware, int64_t span) {
  const auto raw = span <= hardware.gpus_per_node ? hardware.link_bandwidth : hardware.network_bandwidth;
  return raw * hardware.bandwidth_efficiency;
}

TimeEstimate estimate_time(const PlanRequest& request, const Topology& topology, const PlannedStages& stages,
                           const std::vector<StageEstimate>& estimates, int64_t micro_batches,
                           const PlannedSchedule& schedule, double& bubble_fraction) {
  const auto& sizes = topology.sizes();
  const auto& hardware = request.hardware;
  TimeEstimate time;
  const auto m = static_cast<double>(micro_batches);
  StageTime slowest;
  double boundary = 0;
  const int64_t tp_span = sizes.tensor, cp_span = tp_span * sizes.context, dp_span = cp_span * sizes.data;
  for (size_t i = 0; i < stages.size(); ++i) {
    const auto stage = stage_time(*stages[i], request);
    if (stage.forward + stage.backward > slowest.forward + slowest.backward) slowest = stage;
    const auto& traffic = estimates[i].traffic;
    auto seconds = [&](GroupKind kind, int64_t span) {
      return static_cast<double>(wire_bytes(traffic, kind)) / bandwidth(hardware, span);
    };
    time.tensor = std::max(time.tensor, seconds(GroupKind::kTensor, tp_span));
    time.context = std::max(time.context, seconds(GroupKind::kContext, cp_span));
    const int64_t etp_span = sizes.expert_tensor, ep_span = etp_span * sizes.expert;
    time.expert =
        std::max(time.expert, seconds(GroupKind::kExpert, ep_span) + seconds(GroupKind::kExpertTensor, etp_span) +
                                  seconds(GroupKind::kTensorContext, cp_span));
    time.data =
        std::max(time.data, seconds(GroupKind::kDataContext, dp_span) + seconds(GroupKind::kExpertData, dp_span) +
                                seconds(GroupKind::kEmbedding, topology.world_size()));
    boundary = std::max(boundary, static_cast<double>(stages[i]->boundary));
    // fp32 gradient, master and moments are read, the latter three written, the parameter written; the gradient is
    // zeroed and read for the norm. A remainder is half a master, to which the parameter is read.
    const double state = request.optimizer.store_param_remainders ? 26 : 28;
    double moved = 0;
    for (const auto& bucket : stages[i]->buffers.buckets) {
      if (!bucket.trainable) continue;
      const double share = stages[i]->buffers.sharding == Sharding::kNone ? 1 : static_cast<double>(bucket.ranks);
      moved += static_cast<double>(bucket.elements) * ((state + static_cast<double>(bucket.element)) / share + 8);
    }
    time.optimizer = std::max(time.optimizer, moved / (hardware.memory_bandwidth * hardware.bandwidth_efficiency));
  }
  time.compute = m * (slowest.forward + slowest.backward);
  if (sizes.pipeline > 1) {
    // The idle part stretches with everything a micro-batch does on a stage.
    const double busy = time.compute + time.tensor + time.context + time.expert;
    const double idle = schedule.idle / m;
    time.bubble = busy * idle;
    bubble_fraction = idle / (1 + idle);
    // Forward and backward wait for one message each, per micro-batch and chunk and on the way through all stages.
    const auto chunks = static_cast<double>(stages.front()->chunks.size());
    time.pipeline = 2 * (m * chunks + sizes.pipeline - 1) * boundary / bandwidth(hardware, dp_span + 1);
  }
  return time;
}

}  // namespace mcore_bridge
