#include "train/parameter_buffers.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>

#include "layers/weight_gradients.h"
#include "mcore_bridge/error.h"
#include "models/gpt_model.h"

namespace mcore_bridge {

std::vector<ManagedParameter> managed_parameters(const Chunks& chunks) {
  std::vector<ManagedParameter> result;
  for (size_t chunk = 0; chunk < chunks.size(); ++chunk) {
    std::map<const at::TensorImpl*, ParallelLinear*> in_fp8;
    for (const auto& [name, layer] : chunks[chunk]->linears()) {
      if (layer->weight_in_fp8()) in_fp8[layer->weight().unsafeGetTensorImpl()] = layer;
    }
    for (auto& parameter : chunks[chunk]->named_parameters()) {
      if (parameter.traits.buffer) continue;
      const auto codes = in_fp8.find(parameter.tensor.unsafeGetTensorImpl());
      result.push_back({parameter.name, static_cast<int>(chunk), chunks[chunk]->unit_of(parameter.name),
                        parameter.tensor, parameter.traits, parameter.tensor.requires_grad(),
                        codes == in_fp8.end() ? nullptr : codes->second});
    }
  }
  return result;
}

/// Told by autograd that a parameter's gradient has grown.
class ParameterBuffers::Hook : public torch::autograd::PostAccumulateGradHook {
 public:
  Hook(ParameterBuffers* buffers, size_t bucket, size_t entry) : buffers_(buffers), bucket_(bucket), entry_(entry) {}
  void operator()(const torch::autograd::Variable&) override { buffers_->arrived(bucket_, entry_); }

 private:
  ParameterBuffers* buffers_;
  size_t bucket_, entry_;
};

std::vector<BucketLayout> bucket_layouts(const std::vector<ManagedParameter>& parameters, const ParallelState& parallel,
                                         const BufferOptions& options) {
  // One reduction serves parameters of one group and dtype; the tied embedding has the same place on both its stages
  // only when it is alone; units that come and go have buckets of their own.
  using Key = std::tuple<bool, bool, at::ScalarType, bool, int, bool, int, int>;
  std::map<Key, int> keys;
  std::vector<LayoutItem> items;
  const bool by_unit = options.sharding >= Sharding::kGradients;
  for (const auto& parameter : parameters) {
    const bool whole = parameter.trainable && options.sharding == Sharding::kOptimizer && options.whole(parameter);
    const Key key{parameter.trainable,
                  parameter.traits.expert,
                  parameter.tensor.scalar_type(),
                  whole,
                  parameter.traits.tied_embedding ? parameter.chunk + 1 : 0,
                  by_unit,
                  by_unit ? parameter.chunk : 0,
                  by_unit ? parameter.unit : 0};
    const auto& group = parallel.replicas(parameter.traits.expert);
    items.push_back({.elements = parameter.tensor.numel(),
                     .shards = options.sharding == Sharding::kNone ? 1 : group.size(),
                     .key = keys.try_emplace(key, static_cast<int>(keys.size())).first->second,
                     .order = parameter.trainable ? options.class_of(parameter) : 0,
                     .whole = whole});
  }
  return layout_buckets(items, by_unit ? std::numeric_limits<int64_t>::max() : options.bucket_elements);
}

ParameterBuffers::ParameterBuffers(std::vector<ManagedParameter> parameters, ParallelStatePtr parallel,
                                   BufferOptions options)
    : parallel_(std::move(parallel)), options_(std::move(options)) {
  const bool all = options_.sharding == Sharding::kParameters;
  bool trains = false;
  for (auto& parameter : parameters) {
    trains = trains || parameter.trainable;
    if (all || parameter.trainable) parameters_.push_back(std::move(parameter));
  }
  MCB_CHECK(trains || parallel_->topology.sizes().pipeline > 1, "Trainer: no parameter requires gradients");
  std::vector<const ManagedParameter*> pointers;
  for (const auto& parameter : parameters_) pointers.push_back(&parameter);
  for (const auto& layout : bucket_layouts(parameters_, *parallel_, options_)) {
    const auto& group = parallel_->replicas(pointers[layout.slots[0].item]->traits.expert);
    buckets_.push_back(std::make_unique<Bucket>(layout, pointers, group, options_.sharding, options_.grad_dtype));
    arrived_.emplace_back(buckets_.back()->entries().size());
    missing_.push_back(0);
  }
}

ParameterBuffers::~ParameterBuffers() { disconnect(); }

void ParameterBuffers::connect() {
  if (std::exchange(connected_, true)) return;
  for (size_t b = 0; b < buckets_.size(); ++b) {
    auto& bucket = *buckets_[b];
    if (!bucket.trainable()) continue;
    bucket.register_main_gradients(true);
    for (size_t e = 0; e < bucket.entries().size(); ++e) {
      torch::autograd::impl::set_post_acc_grad_hooks(bucket.entries()[e].parameter->tensor,
                                                     std::make_unique<Hook>(this, b, e));
    }
  }
}

void ParameterBuffers::disconnect() {
  if (!std::exchange(connected_, false)) return;
  for (auto& bucket : buckets_) bucket->register_main_gradients(false);
  for (auto& parameter : parameters_) {
    if (!parameter.trainable) continue;
    parameter.tensor.mutable_grad().reset();
    torch::autograd::impl::set_post_acc_grad_hooks(parameter.tensor, nullptr);
  }
}

void ParameterBuffers::begin(int micro_batches) {
  connect();
  micro_batches_ = micro_batches;
  launched_ = 0;
  reducing_ = nullptr;
  for (size_t b = 0; b < buckets_.size(); ++b) {
    auto& bucket = *buckets_[b];
    if (!bucket.trainable()) continue;
    bucket.zero_gradients();
    std::fill(arrived_[b].begin(), arrived_[b].end(), 0);
    missing_[b] = arrived_[b].size();
    for (const auto& entry : bucket.entries()) entry.parameter->tensor.mutable_grad().reset();
  }
}

void ParameterBuffers::arrived(size_t b, size_t e) {
  auto& bucket = *buckets_[b];
  const auto& entry = bucket.entries()[e];
  // Autograd tells of a gradient that was put aside as well, and again when it comes.
  if (auto* later = WeightGradients::current(); later && later->holds(entry.parameter->tensor)) return;
  if (!bucket.contributed(entry)) return;
  if (options_.sharding >= Sharding::kGradients) {
    bucket.take(entry);
    if (arrived_[b][e]++ > 0 || --missing_[b] > 0) return;
    // The whole unit: one reduction under way at a time, so that no more than two units' gradients exist.
    std::fill(arrived_[b].begin(), arrived_[b].end(), 0);
    missing_[b] = arrived_[b].size();
    if (reducing_) reducing_->finish_reduce();
    reducing_ = &bucket;
    bucket.start_reduce();
    return;
  }
  // Late gradients would be lost: the sums of this bucket are under way.
  MCB_CHECK(b >= launched_ || !options_.overlap_grad_reduce, "overlap_grad_reduce: ", entry.parameter->name,
            " got a gradient after its bucket was reduced; train without overlap_grad_reduce and report this model");
  bucket.take(entry);
  if (++arrived_[b][e] == micro_batches_) --missing_[b];
  if (!options_.overlap_grad_reduce) return;
  // In the order of the buckets, which is the same on all ranks.
  while (launched_ < buckets_.size() && buckets_[launched_]->trainable() && missing_[launched_] == 0)
    buckets_[launched_++]->start_reduce();
}

void ParameterBuffers::finish_gradients() {
  launched_ = buckets_.size();
  for (auto& bucket : buckets_) {
    if (bucket->trainable()) bucket->start_reduce();
    // Without overlap one at a time is as fast and needs no further memory.
    if (bucket->trainable() && !options_.overlap_grad_reduce) bucket->finish_reduce();
  }
  for (auto& bucket : buckets_) {
    if (bucket->trainable()) bucket->finish_reduce();
  }
  complete_gradients(pieces(false), *parallel_);
}

std::vector<GradientPiece> ParameterBuffers::pieces(bool norm) const {
  std::vector<GradientPiece> result;
  for (const auto& bucket : buckets_) {
    if (!bucket->trainable()) continue;
    if (norm && !bucket->sharded() && bucket->group().rank() != 0) continue;  // replicas
    for (const auto& entry : bucket->entries()) {
      const auto begin = std::clamp<int64_t>(bucket->begin() - entry.offset, 0, entry.elements());
      const auto end = std::clamp<int64_t>(bucket->end() - entry.offset, 0, entry.elements());
      if (begin == end) continue;
      result.push_back({bucket->grad_shard().narrow(0, entry.offset + begin - bucket->begin(), end - begin), begin, end,
                        row_elements(entry.parameter->tensor), entry.parameter->traits});
    }
  }
  return result;
}

at::Tensor ParameterBuffers::sum_of_squares() const {
  const auto device = parameters_.empty() ? c10::Device(c10::kCPU) : parameters_[0].tensor.device();
  return mcore_bridge::sum_of_squares(pieces(true), *parallel_, device);
}

void ParameterBuffers::gather_parameters() {
  if (options_.sharding == Sharding::kNone || options_.sharding == Sharding::kParameters) return;
  // The units used first are gathered first.
  for (auto bucket = buckets_.rbegin(); bucket != buckets_.rend(); ++bucket) {
    (*bucket)->start_gather();
    if (!options_.overlap_param_gather) (*bucket)->finish_gather();
  }
}

std::vector<Bucket*> ParameterBuffers::buckets_of(int chunk, int unit) const {
  std::vector<Bucket*> result;
  for (const auto& bucket : buckets_) {
    const auto& entries = bucket->entries();
    if (std::any_of(entries.begin(), entries.end(), [&](const Bucket::Entry& entry) {
          return entry.parameter->chunk == chunk && entry.parameter->unit == unit;
        }))
      result.push_back(bucket.get());
  }
  return result;
}

}  // namespace mcore_bridge
