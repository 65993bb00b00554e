#include "train/sharded_optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <regex>

#include "mcore_bridge/error.h"
#include "train/state_runs.h"

namespace mcore_bridge {
namespace {

Sharding sharding_named(const std::string& name) {
  return name == "no_shard"      ? Sharding::kNone
         : name == "optim"       ? Sharding::kOptimizer
         : name == "optim_grads" ? Sharding::kGradients
                                 : Sharding::kParameters;
}

bool is_muon(const OptimizerOptions& options) {
  return options.optimizer == "muon" || options.optimizer == "dist_muon";
}

/// Muon is for matrices that map features to features; a matrix with a row per token is a table of vectors.
bool orthogonalizes(const OptimizerOptions& options, const ManagedParameter& parameter) {
  return is_muon(options) && parameter.tensor.dim() == 2 && !parameter.traits.vocabulary;
}

double lr_mult(const OptimizerOptions& options, const std::string& name) {
  for (const auto& [pattern, factor] : options.lr_mult) {
    if (std::regex_search(name, std::regex(pattern))) return factor;
  }
  return 1;
}

/// What tells segments apart.
struct UpdateClass {
  bool matrix, decays;
  double lr_mult;
  auto operator<=>(const UpdateClass&) const = default;
};

UpdateClass class_of(const OptimizerOptions& options, const ManagedParameter& parameter) {
  return {orthogonalizes(options, parameter), !parameter.traits.no_weight_decay, lr_mult(options, parameter.name)};
}

at::Tensor zeros(int64_t elements, at::ScalarType dtype, c10::Device device, bool host) {
  if (!host) return at::zeros({elements}, at::TensorOptions(device).dtype(dtype));
  return at::zeros({elements}, at::TensorOptions(at::kCPU).dtype(dtype).pinned_memory(device.is_cuda()));
}

}  // namespace

BufferOptions buffer_options(const OptimizerOptions& options) {
  BufferOptions result{.sharding = sharding_named(options.sharding()),
                       .overlap_grad_reduce = options.overlap_grad_reduce,
                       .overlap_param_gather = options.overlap_param_gather,
                       .grad_dtype = precision(options.main_grads_dtype),
                       .bucket_elements = options.ddp_bucket_size};
  result.class_of = [options](const ManagedParameter& parameter) {
    // Equal classes get equal numbers, others others: factors by their place in the list, 0 for the 1 that is not in
    // it.
    const auto c = mcore_bridge::class_of(options, parameter);
    const auto found = std::find_if(options.lr_mult.begin(), options.lr_mult.end(),
                                    [&](const auto& entry) { return entry.second == c.lr_mult; });
    const auto place = found == options.lr_mult.end() ? 0 : static_cast<int>(found - options.lr_mult.begin()) + 1;
    return place * 4 + (c.matrix ? 0 : 2) + (c.decays ? 0 : 1);
  };
  result.whole = [options](const ManagedParameter& parameter) { return orthogonalizes(options, parameter); };
  return result;
}

ShardedOptimizer::ShardedOptimizer(std::shared_ptr<ParameterBuffers> buffers, ParallelStatePtr parallel,
                                   const OptimizerOptions& options, bool fp16)
    : buffers_(std::move(buffers)), options_(options), scaler_(options, fp16) {
  at::NoGradGuard no_grad;
  const auto scalar = is_muon(options) ? options.muon_scalar_optimizer : options.optimizer;
  scalar_rule_ = scalar == "sgd" ? make_sgd(options) : make_adamw(options);
  const bool pipelined = parallel->topology.sizes().pipeline > 1;
  for (const auto& parameter : buffers_->parameters()) {
    MCB_CHECK(!orthogonalizes(options, parameter) || parameter.traits.shared_rows == 0 || options.muon_split_qkv ||
                  options.muon_tp_mode == "blockwise",
              "muon_tp_mode: ", options.muon_tp_mode, " of ", parameter.name,
              ", whose key and value heads several tensor ranks hold, needs muon_split_qkv");
  }
  if (is_muon(options)) rule_ = make_muon(options, parallel);
  for (const auto& [pattern, factor] : options.lr_mult) {
    const auto& all = buffers_->parameters();
    const std::regex regex(pattern);
    // A stage of a pipeline need not have such a parameter.
    const bool found =
        std::any_of(all.begin(), all.end(), [&](const auto& p) { return std::regex_search(p.name, regex); });
    MCB_CHECK(found || pipelined, "lr_mult: '", pattern, "' is found in no trainable parameter's name");
  }
  if (options.optimizer_cpu_offload) {
    int64_t all = 0;
    for (const auto& bucket : buffers_->buckets()) all += bucket->trainable() ? bucket->end() - bucket->begin() : 0;
    to_offload_ = offloaded_elements(options.optimizer_offload_fraction, all);
  }
  for (const auto& bucket : buffers_->buckets()) {
    if (bucket->trainable()) make_segments(*bucket);
  }
  for (auto& segment : segments_) (segment->on_host ? host_ : device_).push_back(segment.get());
  if (!device_.empty()) steps_ = at::zeros({}, device_[0]->parameter.options().dtype(at::kFloat));
  host_steps_ = at::zeros({}, at::kFloat);
  for (const auto& parameter : buffers_->parameters()) versions_.push_back(parameter.tensor._version());
  const auto& all = buffers_->parameters();
  if (std::any_of(all.begin(), all.end(), [](const auto& p) { return p.trainable && p.in_fp8; })) {
    quantizer_ =
        std::make_shared<ShardQuantizer>(all, segments_, *parallel, buffers_->options().sharding != Sharding::kNone);
    for (const auto& parameter : all)
      if (parameter.in_fp8) parameter.in_fp8->wide().set_masters(quantizer_);
  }
  masters_began();
}

void ShardedOptimizer::make_segments(const Bucket& bucket) {
  const auto kinds = buffer_options(options_);
  const auto& entries = bucket.entries();
  std::vector<StateSlot> slots;
  for (const auto& entry : entries) {
    slots.push_back({.offset = entry.offset,
                     .elements = entry.elements(),
                     .kind = kinds.class_of(*entry.parameter),
                     .whole = kinds.whole(*entry.parameter)});
  }
  for (const auto& run : state_runs(slots, bucket.begin(), bucket.end(), to_offload_)) {
    const auto kind = class_of(options_, *entries[run.first].parameter);
    Segment segment{.lr_mult = kind.lr_mult, .decays = kind.decays, .on_host = run.on_host};
    segment.parameter = bucket.param_shard().narrow(0, run.begin - bucket.begin(), run.end - run.begin);
    segment.grad = bucket.grad_shard().narrow(0, run.begin - bucket.begin(), run.end - run.begin);
    for (const auto& entry : entries) {
      const auto begin = std::max(run.begin, entry.offset), end = std::min(run.end, entry.offset + entry.elements());
      if (begin >= end) continue;
      segment.pieces.push_back({entry.parameter, begin - entry.offset, end - entry.offset, begin - run.begin});
    }
    add_segment(std::move(segment), kind.matrix ? rule_.get() : scalar_rule_.get());
  }
}

void ShardedOptimizer::add_segment(Segment segment, const UpdateRule* rule) {
  const auto elements = segment.parameter.numel();
  const auto device = segment.parameter.device();
  const auto dtype = segment.parameter.scalar_type();
  const bool copies = options_.main_params_dtype == "fp32" && dtype != at::kFloat;
  if (options_.store_param_remainders && dtype == at::kBFloat16) {
    segment.remainder = zeros(elements, at::kShort, device, /*host=*/false);
  } else if (segment.on_host || copies) {
    segment.master = zeros(elements, copies ? at::kFloat : dtype, device, segment.on_host);
    for (const auto& piece : segment.pieces) take_values(segment, piece);
  } else {
    segment.master = segment.parameter;
  }
  if (segment.on_host) segment.host_grad = zeros(elements, segment.grad.scalar_type(), device, true);
  for (const auto& [kind, state_dtype] : rule->kinds())
    segment.states.emplace_back(kind, zeros(elements, state_dtype, device, segment.on_host));
  segments_.push_back(std::make_unique<Segment>(std::move(segment)));
  auto* made = segments_.back().get();
  auto task = std::find_if(tasks_.begin(), tasks_.end(),
                           [&](const Task& t) { return t.rule == rule && t.segments[0]->on_host == made->on_host; });
  if (task == tasks_.end()) task = tasks_.insert(tasks_.end(), Task{rule, {}});
  task->segments.push_back(made);
}

void ShardedOptimizer::take_values(const Segment& segment, const Segment::Piece& piece) {
  const auto length = piece.end - piece.begin;
  if (segment.remainder.defined()) {  // the parameter itself is all there is
    segment.remainder.narrow(0, piece.offset, length).zero_();
    return;
  }
  auto master = segment.master.narrow(0, piece.offset, length);
  auto* layer = piece.parameter->in_fp8;
  if (!layer) {
    master.copy_(segment.parameter.narrow(0, piece.offset, length));
    return;
  }
  master.copy_(layer->weight_values().view({-1}).narrow(0, piece.begin, length));
  if (!layer->wide().known(piece.parameter->tensor)) imprecise_.push_back(piece.parameter->name);
}

void ShardedOptimizer::masters_began() {
  for (const auto& parameter : buffers_->parameters())
    if (parameter.in_fp8) parameter.in_fp8->wide().forget();
  if (imprecise_.empty()) return;
  TORCH_WARN(
      "Trainer: ", imprecise_.size(), " weights kept in FP8 (", imprecise_[0],
      ", ...) were last written as codes alone, or while they were frozen: their fp32 masters begin with what the "
      "codes stand for. load_weights with requires_grad=True gives them the checkpoint's values");
  imprecise_.clear();
}

int64_t ShardedOptimizer::bytes(const std::vector<Segment*>& segments) {
  int64_t result = 0;
  for (const auto* segment : segments) {
    if (segment->has_copy()) result += (segment->remainder.defined() ? segment->remainder : segment->master).nbytes();
    for (const auto& [kind, tensor] : segment->states) result += tensor.nbytes();
  }
  return result;
}

void ShardedOptimizer::take_over() {
  at::NoGradGuard no_grad;
  const auto& parameters = buffers_->parameters();
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto version = parameters[i].tensor._version();
    if (versions_[i] == version) continue;
    versions_[i] = version;
    for (auto& segment : segments_) {
      if (!segment->has_copy()) continue;
      for (const auto& piece : segment->pieces)
        if (piece.parameter == &parameters[i]) take_values(*segment, piece);
    }
  }
  masters_began();
}

void ShardedOptimizer::step(double lr, double weight_decay, const at::Tensor& grad_scale, const at::Tensor& skip) {
  at::NoGradGuard no_grad;
  lr_ = lr;
  weight_decay_ = weight_decay;
  for (auto* segment : host_) segment->host_grad.copy_(segment->grad, /*non_blocking=*/true);
  if (device_.empty()) return;
  steps_.add_(1 - skip);
  std::vector<Segment*> left;
  for (const auto& task : tasks_) {
    if (task.segments[0]->on_host) continue;
    task.rule->apply(task.segments, {lr, weight_decay, grad_scale, skip, steps_});
    std::copy_if(task.segments.begin(), task.segments.end(), std::back_inserter(left),
                 [&](const Segment* segment) { return !task.rule->writes_parameter(*segment); });
  }
  write_back(left);
}

void ShardedOptimizer::finish_on_host(double grad_scale, bool skip) {
  at::NoGradGuard no_grad;
  if (skip) return;
  host_steps_.add_(1);
  if (host_.empty()) return;
  const auto scale = at::full({}, grad_scale, at::kFloat), go = at::zeros({}, at::kFloat);
  for (const auto& task : tasks_) {
    if (task.segments[0]->on_host) task.rule->apply(task.segments, {lr_, weight_decay_, scale, go, host_steps_});
  }
  write_back(host_);
}

void ShardedOptimizer::write_back(const std::vector<Segment*>& segments) {
  std::vector<at::Tensor> parameters, masters;
  for (const auto* segment : segments) {
    if (!segment->has_copy() || segment->is_codes() || segment->remainder.defined()) continue;
    if (segment->on_host) {
      segment->parameter.copy_(segment->master, /*non_blocking=*/true);
      continue;
    }
    parameters.push_back(segment->parameter);
    masters.push_back(segment->master);
  }
  if (!parameters.empty()) at::_foreach_copy_(parameters, masters);
}

void ShardedOptimizer::quantize() {
  if (quantizer_) quantizer_->run();
}

std::vector<StateSlice> ShardedOptimizer::state() {
  std::vector<StateSlice> result;
  for (const auto& segment : segments_) {
    for (const auto& piece : segment->pieces) {
      auto add = [&](const std::string& kind, const at::Tensor& values) {
        result.push_back({piece.parameter->name, piece.parameter->chunk, kind, piece.begin, piece.end,
                          segment->is_codes(), values.narrow(0, piece.offset, piece.end - piece.begin)});
      };
      if (segment->remainder.defined()) {
        add("remainder", segment->remainder);
      } else if (segment->master.scalar_type() != segment->parameter.scalar_type()) {
        add("master", segment->master);
      }
      for (const auto& [kind, values] : segment->states) add(kind, values);
    }
  }
  return result;
}

int64_t ShardedOptimizer::steps() const { return std::llround(host_steps_.item<double>()); }

void ShardedOptimizer::set_steps(int64_t steps) {
  host_steps_.fill_(static_cast<double>(steps));
  if (steps_.defined()) steps_.fill_(static_cast<double>(steps));
}

void ShardedOptimizer::state_loaded() {
  at::NoGradGuard no_grad;
  // Where a copy has the parameter's own dtype no "master" was loaded: the parameter holds the value.
  for (const auto* segment : host_) {
    if (segment->master.scalar_type() == segment->parameter.scalar_type()) segment->master.copy_(segment->parameter);
  }
  write_back(device_);
  write_back(host_);
  quantize();
  buffers_->gather_parameters();
  for (size_t i = 0; i < versions_.size(); ++i) versions_[i] = buffers_->parameters()[i].tensor._version();
}

Json ShardedOptimizer::scalars() const {
  auto result = scaler_.scalars();
  result["skipped"] = skipped;
  return result;
}

void ShardedOptimizer::set_scalars(const Json& values) {
  scaler_.set_scalars(values);
  skipped = values.value("skipped", skipped);
}

}  // namespace mcore_bridge
