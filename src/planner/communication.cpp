#include "planner/communication.h"

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace mcore_bridge {
namespace {

void add(StepTraffic& traffic, GroupKind kind, const Traffic& more) {
  for (int operation = 0; operation < Traffic::kKinds; ++operation) {
    const auto& line = more.lines[operation];
    if (line.calls == 0) continue;
    auto& total = traffic[group_name(kind)][Traffic::name(operation)];
    total.calls += line.calls;
    total.bytes += line.bytes;
    total.wire_bytes += line.wire_bytes;
  }
}

void add(StepTraffic& traffic, const ExpertTraffic& more) {
  add(traffic, GroupKind::kExpert, more.expert);
  add(traffic, GroupKind::kExpertTensor, more.expert_tensor);
  add(traffic, GroupKind::kTensorContext, more.tensor_context);
  add(traffic, GroupKind::kData, more.data);
}

/// What complete_gradients adds up once a step.
void add_partial_gradients(StepTraffic& traffic, const PlannedBuffers& buffers, const ParallelSizes& sizes) {
  const auto bytes = buffers.grad_element;
  const auto tp = sizes.tensor;
  if (buffers.partial > 0) add(traffic, GroupKind::kTensor, Traffic::all_reduce(bytes * buffers.partial, tp));
  if (buffers.expert_partial > 0) {
    add(traffic, GroupKind::kExpertTensor, Traffic::all_reduce(bytes * buffers.expert_partial, sizes.expert_tensor));
  }
  for (const auto& [copies, elements] : buffers.shared)
    add(traffic, GroupKind::kTensor, Traffic::all_reduce(bytes * elements * (tp / copies), tp));
  if (buffers.tied > 0) add(traffic, GroupKind::kEmbedding, Traffic::all_reduce(bytes * buffers.tied, 2));
}

/// How often a micro-batch gathers the parameters of a unit that come and go: for forward and for backward, but the
/// embedding's backward needs none, and what the last unit has in place stays for its backward.
int gathers(const PlannedBuffers::Bucket& bucket, const PlannedStage& stage, const ModelConfig& config) {
  const auto& place = stage.chunks[static_cast<size_t>(bucket.chunk)].place;
  const auto layers = static_cast<int>(place.layers.count), layer = bucket.unit - 1;
  const bool tied_here = place.pre_process && place.post_process && !config.untie_embeddings_and_output_weights;
  if (layer < 0) return 1;
  if (layer == layers) return tied_here ? 2 : 1;
  // Layers that are recomputed together are gathered for that, and once more for their own backward but the last.
  if (config.recompute_granularity != "full" || config.recompute_method == "block") return 2;
  const auto unit = static_cast<int>(config.recompute_num_layers.value_or(1));
  return layer % unit == unit - 1 || layer == layers - 1 ? 2 : 3;
}

/// Gradients and parameters over the ranks that share the buckets out.
void add_buckets(StepTraffic& traffic, const PlannedStage& stage, const ModelConfig& config, int64_t micro_batches) {
  const auto& buffers = stage.buffers;
  for (const auto& bucket : buffers.buckets) {
    const auto kind = bucket.expert ? GroupKind::kExpertData : GroupKind::kDataContext;
    const auto gradients = buffers.grad_element * bucket.elements, parameters = bucket.element * bucket.elements;
    if (buffers.sharding == Sharding::kParameters)
      add(traffic, kind,
          Traffic::all_gather(parameters, bucket.ranks) * (gathers(bucket, stage, config) * micro_batches));
    if (!bucket.trainable) continue;
    if (buffers.sharding == Sharding::kNone) {
      add(traffic, kind, Traffic::all_reduce(gradients, bucket.ranks));
    } else if (buffers.sharding == Sharding::kOptimizer) {
      add(traffic, kind, Traffic::reduce_scatter(gradients, bucket.ranks));
      add(traffic, kind, Traffic::all_gather(parameters, bucket.ranks));
    } else {
      add(traffic, kind, Traffic::reduce_scatter(gradients, bucket.ranks) * micro_batches);
      if (buffers.sharding == Sharding::kGradients) add(traffic, kind, Traffic::all_gather(parameters, bucket.ranks));
    }
  }
}

/// The scales of weights that train as FP8 codes: of blocks each rank's own, of tensors the whole ones'.
void add_magnitudes(StepTraffic& traffic, const PlannedBuffers& buffers, const ModelConfig& config,
                    const ParallelSizes& sizes, int replicas) {
  if (buffers.magnitudes == 0) return;
  const auto bytes = 4 * buffers.magnitudes;
  if (buffers.sharding != Sharding::kNone) add(traffic, GroupKind::kDataContext, Traffic::all_reduce(bytes, replicas));
  if (config.fp8_recipe != "blockwise") add(traffic, GroupKind::kTensor, Traffic::all_reduce(bytes, sizes.tensor));
}

}  // namespace

StepTraffic step_traffic(const PlannedStage& stage, const PlanRequest& request, const Topology& topology,
                         int64_t micro_batches) {
  StepTraffic traffic;
  const auto& sizes = topology.sizes();
  for (const auto& chunk : stage.chunks) {
    for (const auto& segment : chunk.segments) {
      const auto& footprint = segment.footprint;
      add(traffic, GroupKind::kTensor, (footprint.tensor_forward * micro_batches));
      add(traffic, GroupKind::kTensor, (footprint.tensor_backward * micro_batches));
      add(traffic, GroupKind::kContext, (footprint.context_forward * micro_batches));
      add(traffic, GroupKind::kContext, (footprint.context_backward * micro_batches));
      add(traffic, footprint.experts_forward * micro_batches);
      add(traffic, footprint.experts_backward * micro_batches);
    }
    if (sizes.pipeline > 1) {
      // Activations one way, their gradients the other.
      if (!chunk.place.post_process)
        add(traffic, GroupKind::kPipeline, Traffic::exchange(stage.boundary) * micro_batches);
      if (!chunk.place.pre_process)
        add(traffic, GroupKind::kPipeline, Traffic::exchange(stage.boundary) * micro_batches);
    }
  }
  add_partial_gradients(traffic, stage.buffers, sizes);
  // Loads of the routers whose expert biases move.
  if (stage.summed_loads > 0) {
    add(traffic, GroupKind::kTensorContext, Traffic::all_reduce(8 * stage.summed_loads, sizes.tensor * sizes.context));
    add(traffic, GroupKind::kData, Traffic::all_reduce(8 * stage.summed_loads, sizes.data));
  }
  add_buckets(traffic, stage, request.config, micro_batches);
  add_magnitudes(traffic, stage.buffers, request.config, sizes, sizes.data * sizes.context);
  // Agreement on the batch (an int64 a check, three counts) and the step's loss and norm (two doubles).
  const auto world = topology.world_size();
  add(traffic, GroupKind::kContext, Traffic::all_reduce(2 * 8, sizes.context));
  add(traffic, GroupKind::kData, Traffic::all_reduce(3 * 8, sizes.data));
  add(traffic, GroupKind::kWorld, Traffic::all_reduce(8, world) * (sizes.data > 1 ? 3 : 2));
  add(traffic, GroupKind::kWorld, Traffic::all_reduce(2 * 8, world));
  return traffic;
}

int64_t wire_bytes(const StepTraffic& traffic, GroupKind kind) {
  int64_t sum = 0;
  const auto found = traffic.find(group_name(kind));
  if (found == traffic.end()) return sum;
  for (const auto& [operation, line] : found->second) sum += line.wire_bytes;
  return sum;
}

}  // namespace mcore_bridge
