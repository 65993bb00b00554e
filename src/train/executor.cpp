#include "train/executor.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <optional>

#include "core/phase_timer.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using Kind = Action::Kind;

ScheduleOptions schedule_options(const ModelConfig& config, int stages, size_t micro_batches) {
  return {.name = config.pipeline_schedule,
          .stages = stages,
          .chunks = static_cast<int>(config.virtual_stages()),
          .micro_batches = static_cast<int>(micro_batches),
          .group_size = static_cast<int>(config.microbatch_group_size_per_vp_stage.value_or(0))};
}

template <class Map>
auto take(Map& map, const typename Map::key_type& key) {
  auto node = map.extract(key);
  TORCH_INTERNAL_ASSERT(!node.empty(), "the schedule uses what is not there");
  return std::move(node.mapped());
}

/// Backward from `output`, given `gradient`.
void run_backward(torch::autograd::Edge output, const at::Tensor& gradient) {
  torch::autograd::Engine::get_default_engine().execute({std::move(output)}, {gradient}, /*keep_graph=*/false,
                                                        /*create_graph=*/false, /*accumulate_grad=*/true);
}

at::Tensor on_device(const std::vector<double>& values, c10::Device device) {
  return at::tensor(at::ArrayRef<double>(values), at::kDouble).to(device, /*non_blocking=*/true);
}

}  // namespace

Executor::Executor(const Chunks& chunks, const OptimizerOptions& options) : chunks_(chunks) {
  if (options.cuda_graph_impl != "none") graphs_ = std::make_unique<MicroBatchGraphs>(*chunks_.at(0), options);
}

at::Tensor Executor::train_with_graphs(const std::vector<ForwardInput>& batches, const std::vector<double>& weights) {
  const TimedPhase timed(Phase::kBackward, chunks_[0]->device());  // forward and backward are one
  at::Tensor(graphs_->loss()).zero_();
  for (size_t i = 0; i < batches.size(); ++i) {
    auto batch = batches[i];
    batch.loss_weight = at::scalar_tensor(weights[i], at::kDouble);
    graphs_->run(batch, [this](const ForwardInput& input) {
      const auto output = chunks_[0]->forward(input);
      const auto loss = output.detach();
      if (output.requires_grad()) run_backward(torch::autograd::impl::gradient_edge(output), at::ones_like(loss));
      at::NoGradGuard no_grad;
      auto sum = graphs_->loss();
      sum.add_(loss);
    });
  }
  return graphs_->loss().clone();
}

at::Tensor Executor::train(const std::vector<ForwardInput>& batches, const std::vector<double>& weights) {
  if (graphs_) return train_with_graphs(batches, weights);
  auto& schedule = schedules_[{true, static_cast<int>(batches.size())}];
  if (schedule.empty()) schedule = make_schedule(schedule_options(chunks_.at(0)->config(), stages(), batches.size()));
  const auto& row = schedule.at(stage());
  const bool split = std::any_of(row.begin(), row.end(), [](const auto& a) { return a.kind == Kind::kBackwardInput; });
  std::optional<SplitBackward> scope;
  if (split) scope.emplace();
  return run(schedule, batches, weights);
}

at::Tensor Executor::evaluate(const std::vector<ForwardInput>& batches, const std::vector<double>& weights) {
  at::NoGradGuard no_grad;
  auto& schedule = schedules_[{false, static_cast<int>(batches.size())}];
  const auto options = schedule_options(chunks_.at(0)->config(), stages(), batches.size());
  if (schedule.empty())
    schedule = forward_only(options.stages, options.chunks, options.micro_batches, options.group_size);
  return run(schedule, batches, weights);
}

at::Tensor Executor::run(const std::vector<StageSchedule>& schedule, const std::vector<ForwardInput>& batches,
                         const std::vector<double>& weights) {
  clear();  // of a run that threw
  batches_ = &batches;
  weights_ = on_device(weights, chunks_[0]->device());
  loss_ = at::zeros({}, at::TensorOptions(chunks_[0]->device()).dtype(at::kDouble));
  connect();
  for (const auto& action : schedule.at(stage())) {
    switch (action.kind) {
      case Kind::kForward:
        forward(action);
        break;
      case Kind::kBackward:
      case Kind::kBackwardInput:
        backward(action);
        break;
      case Kind::kBackwardWeight:
        backward_weight(action);
        break;
      case Kind::kStart:
        start(action.messages);
        break;
      case Kind::kWait:
        wait(action.messages);
        break;
    }
  }
  return std::exchange(loss_, {});
}

void Executor::forward(const Action& action) {
  const TimedPhase timed(Phase::kForward, chunks_[0]->device());
  auto& model = *chunks_.at(action.chunk);
  auto input = batches_->at(action.micro_batch);
  Live live;
  if (!model.place().pre_process) {
    live.input = take(inbox_, {false, global(action.chunk) - 1, action.micro_batch});
    if (at::GradMode::is_enabled()) live.input.requires_grad_(true);
    input.hidden = live.input;
  }
  if (!model.place().post_process) input.labels = at::Tensor();
  input.loss_weight = weights_[action.micro_batch];
  const auto output = model.forward(input);
  if (model.place().post_process) {
    at::NoGradGuard no_grad;
    loss_ += output.detach();
    live.losses = output.detach();
  } else {
    outbox_[{false, global(action.chunk), action.micro_batch}] = output.detach().contiguous();
  }
  if (!at::GradMode::is_enabled()) return;
  if (output.requires_grad()) live.output = torch::autograd::impl::gradient_edge(output);
  live_[{action.chunk, action.micro_batch}] = std::move(live);
}

void Executor::backward(const Action& action) {
  const TimedPhase timed(Phase::kBackward, chunks_[0]->device());
  const Place place{action.chunk, action.micro_batch};
  const bool first = chunks_.at(action.chunk)->place().pre_process;
  auto live = take(live_, place);
  const auto gradient = live.losses.defined() ? at::ones_like(live.losses)
                                              : take(inbox_, {true, global(action.chunk), action.micro_batch});
  live.losses.reset();
  std::optional<DeferWeightGradients> scope;
  if (action.kind == Kind::kBackwardInput) scope.emplace(deferred_[place]);
  // A first chunk whose parameters are all frozen has nothing to do.
  if (live.output.is_valid()) run_backward(std::move(live.output), gradient);
  if (!first) outbox_[{true, global(action.chunk) - 1, action.micro_batch}] = live.input.grad().contiguous();
}

void Executor::backward_weight(const Action& action) {
  const TimedPhase timed(Phase::kBackward, chunks_[0]->device());
  const auto found = deferred_.find({action.chunk, action.micro_batch});
  TORCH_INTERNAL_ASSERT(found != deferred_.end(), "the schedule uses what is not there");
  found->second.run();
  deferred_.erase(found);
}

void Executor::start(const std::vector<Action::Message>& messages) {
  const auto& parallel = chunks_[0]->parallel();
  const int chunks = stages() * static_cast<int>(chunks_.size());
  for (const auto& [send, gradient, chunk, micro_batch, peer] : messages) {
    const auto tag = static_cast<uint32_t>(2 * (micro_batch * chunks + chunk) + (gradient ? 1 : 0));
    const Key key{gradient, chunk, micro_batch};
    auto& transfer = under_way_[{send, gradient, chunk, micro_batch}];
    if (send) {
      transfer = parallel.way(stage(), peer).send(take(outbox_, key), peer, tag);
    } else {
      const auto tensor = empty_hidden(batches_->at(micro_batch));
      inbox_[key] = tensor;
      transfer = parallel.way(peer, stage()).receive(tensor, peer, tag);
    }
  }
}

void Executor::wait(const std::vector<Action::Message>& messages) {
  const TimedPhase timed(Phase::kCommunication, chunks_[0]->device());
  for (const auto& [send, gradient, chunk, micro_batch, peer] : messages)
    take(under_way_, {send, gradient, chunk, micro_batch})->wait();
}

void Executor::clear() {
  live_.clear();
  deferred_.clear();
  inbox_.clear();
  outbox_.clear();
  under_way_.clear();
}

void Executor::connect() {
  if (std::exchange(connected_, true) || stages() == 1 || !chunks_[0]->device().is_cuda()) return;
  const auto& parallel = chunks_[0]->parallel();
  auto tensor = at::zeros({1}, at::TensorOptions(chunks_[0]->device()).dtype(at::kFloat));
  for (int one = 0; one < stages(); ++one) {
    const int other = (one + 1) % stages();
    if (other == 0 && chunks_.size() == 1) break;
    for (const auto& [from, to] : {std::pair{one, other}, std::pair{other, one}}) {
      if (stage() == from) parallel.way(from, to).send(tensor, to)->wait();
      if (stage() == to) parallel.way(from, to).receive(tensor, from)->wait();
    }
  }
}

at::Tensor Executor::empty_hidden(const ForwardInput& batch) const {
  const auto& model = *chunks_[0];
  const auto& config = model.config();
  const auto length = batch.input_ids.size(1) / (config.sequence_parallel ? model.parallel().tp.size() : 1);
  return at::empty({length, batch.input_ids.size(0), config.hidden_size},
                   at::TensorOptions(model.device()).dtype(config.params_dtype));
}

}  // namespace mcore_bridge
