#include "planner/buffers.h"

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>

#include "layers/linear.h"
#include "train/sharded_optimizer.h"
#include "train/state_runs.h"
#include "train/update_rule.h"

namespace mcore_bridge {
namespace {

int64_t bytes_of(const UpdateRule& rule) {
  int64_t sum = 0;
  for (const auto& [kind, dtype] : rule.kinds()) sum += static_cast<int64_t>(c10::elementSize(dtype));
  return sum;
}

/// Bytes of master and states per element of a parameter.
class StateBytes {
 public:
  explicit StateBytes(const OptimizerOptions& options)
      : master_(options.main_params_dtype == "fp32"), remainders_(options.store_param_remainders) {
    const bool muon = options.optimizer == "muon" || options.optimizer == "dist_muon";
    const auto scalar = muon ? options.muon_scalar_optimizer : options.optimizer;
    vectors_ = bytes_of(scalar == "sgd" ? *make_sgd(options) : *make_adamw(options));
    matrices_ = muon ? bytes_of(*make_muon(options, ParallelState::single())) : vectors_;
  }
  int64_t of(const ManagedParameter& parameter, bool orthogonalized) const {
    const auto dtype = parameter.tensor.scalar_type();
    const int64_t copy = !master_ || dtype == at::kFloat ? 0 : remainders_ && dtype == at::kBFloat16 ? 2 : 4;
    return copy + (orthogonalized ? matrices_ : vectors_);
  }

 private:
  bool master_, remainders_;
  int64_t vectors_ = 0, matrices_ = 0;
};

/// How much of [first, last) lies in [0, end).
int64_t before(int64_t end, int64_t first, int64_t last) { return std::max<int64_t>(0, std::min(end, last) - first); }

}  // namespace

PlannedBuffers plan_buffers(const std::vector<ManagedParameter>& parameters, const ParallelState& parallel,
                            const OptimizerOptions& options) {
  const auto buffers = buffer_options(options);
  const StateBytes states(options);
  PlannedBuffers result{.sharding = buffers.sharding,
                        .grad_element = static_cast<int64_t>(c10::elementSize(buffers.grad_dtype))};
  const bool shards_all = result.sharding == Sharding::kParameters,
             shards_grads = result.sharding >= Sharding::kGradients;
  std::vector<ManagedParameter> managed;
  for (const auto& parameter : parameters) {
    result.parameters += parameter.tensor.numel();
    if (parameter.trainable) result.trainable += parameter.tensor.numel();
    if (parameter.trainable && parameter.in_fp8) result.magnitudes += parameter.in_fp8->fp8()->stored_scale().numel();
    if (parameter.trainable || shards_all) {
      managed.push_back(parameter);
    } else {
      result.weights += static_cast<int64_t>(parameter.tensor.nbytes());
    }
  }
  result.optimizer = 4 * result.magnitudes;
  const auto layouts = bucket_layouts(managed, parallel, buffers);
  int64_t to_offload = 0;
  for (const auto& layout : layouts)
    to_offload += managed[static_cast<size_t>(layout.slots[0].item)].trainable ? layout.elements / layout.shards : 0;
  to_offload = options.optimizer_cpu_offload ? offloaded_elements(options.optimizer_offload_fraction, to_offload) : 0;
  for (const auto& layout : layouts) {
    const auto& first = managed[static_cast<size_t>(layout.slots[0].item)];
    const int64_t ranks = parallel.replicas(first.traits.expert).size();
    const auto element = static_cast<int64_t>(c10::elementSize(first.tensor.scalar_type()));
    const auto shard = layout.elements / layout.shards;
    result.buckets.push_back(
        {layout.elements, ranks, element, first.trainable, first.traits.expert, first.chunk, first.unit});
    auto& unit = result.units[{first.chunk, first.unit}];
    if (ranks > 1 && result.sharding != Sharding::kNone) {
      const auto copied = layout.elements * std::max(element, first.trainable ? result.grad_element : 0);
      result.copied = std::max(result.copied, copied);
      if (shards_grads) unit.copied = std::max(unit.copied, copied);
    }
    result.weights += element * (shards_all ? shard : layout.elements);
    if (shards_all) unit.parameters += element * layout.elements;
    if (!first.trainable) continue;
    result.gradients += result.grad_element * (shards_grads ? shard : layout.elements);
    if (shards_grads) unit.gradients += result.grad_element * layout.elements;
    std::vector<StateSlot> slots;
    for (const auto& slot : layout.slots) {
      const auto& parameter = managed[static_cast<size_t>(slot.item)];
      const auto elements = parameter.tensor.numel(), mine = before(shard - slot.offset, 0, elements);
      slots.push_back({slot.offset, elements, buffers.class_of(parameter), buffers.whole(parameter)});
      const auto& traits = parameter.traits;
      const auto row = row_elements(parameter.tensor);
      if (traits.sum_over_tp) (traits.expert ? result.expert_partial : result.partial) += mine;
      if (traits.tied_embedding) result.tied += mine;
      if (traits.shared_rows > 0) {
        const auto from = traits.shared_first_row * row;
        const auto held = before(mine, from, from + traits.shared_rows * row);
        if (held > 0) result.shared[traits.shared_copies] += held;
      }
    }
    for (const auto& run : state_runs(slots, 0, shard, to_offload)) {
      const auto& parameter = managed[static_cast<size_t>(layout.slots[run.first].item)];
      if (!run.on_host) result.optimizer += (run.end - run.begin) * states.of(parameter, slots[run.first].whole);
    }
  }
  return result;
}

int64_t PlannedBuffers::passing(int chunk, int unit, bool head, bool copies) const {
  auto at = [&](int index) {
    const auto found = units.find({chunk, index});
    return found == units.end() ? Unit{} : found->second;
  };
  auto reduced = at(unit + 1).gradients;
  if (!units.contains({chunk, unit + 1})) {
    // Of the backward before: the first unit of a chunk.
    for (const auto& [place, other] : units) {
      if (!units.contains({place.first, place.second - 1})) reduced = std::max(reduced, other.gradients);
    }
  }
  const auto own = at(unit);
  return own.parameters + own.gradients + (copies ? own.copied : 0) + (head ? 0 : at(unit - 1).parameters) + reduced;
}

}  // namespace mcore_bridge
