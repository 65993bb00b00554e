#include "train/executor.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include "core/phase_timer.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {

at::Tensor Executor::empty_hidden(const ForwardInput& batch) const {
  const auto& model = *chunks_[0];
  const auto& config = model.config();
  const auto length = batch.input_ids.size(1) / (config.sequence_parallel ? model.parallel().tp.size() : 1);
  return at::empty({length, batch.input_ids.size(0), config.hidden_size},
                   at::TensorOptions(model.device()).dtype(config.params_dtype));
}

at::Tensor Executor::train(const std::vector<StageSchedule>& schedule, const std::vector<ForwardInput>& batches,
                           const std::vector<double>& weights) {
  batches_ = &batches;
  weights_ = &weights;
  loss_ = at::zeros({}, at::TensorOptions(chunks_[0]->device()).dtype(at::kDouble));
  for (const auto& action : schedule.at(chunks_[0]->parallel().place.pp)) {
    switch (action.kind) {
      case Action::Kind::kForward:
        forward(action.micro_batch);
        break;
      case Action::Kind::kBackward:
        backward(action.micro_batch);
        break;
      case Action::Kind::kExchange:
        exchange(action.messages);
        break;
    }
  }
  live_.clear();
  sends_.clear();
  gradients_in_.clear();
  gradients_out_.clear();
  return loss_;
}

void Executor::forward(int micro_batch) {
  const TimedPhase timed(Phase::kForward, chunks_[0]->device());
  auto& model = *chunks_[0];
  auto input = (*batches_)[micro_batch];
  auto& live = live_[micro_batch];
  input.hidden = live.input;
  if (!model.place().post_process) input.labels = at::Tensor();
  live.output = model.forward(input);
  if (model.place().post_process) {
    at::NoGradGuard no_grad;
    loss_ += live.output.detach().to(at::kDouble).sum() * (*weights_)[micro_batch];
  }
}

void Executor::backward(int micro_batch) {
  const TimedPhase timed(Phase::kBackward, chunks_[0]->device());
  auto live = std::move(live_.at(micro_batch));
  live_.erase(micro_batch);
  at::Tensor gradient;
  if (chunks_[0]->place().post_process) {
    gradient = at::full_like(live.output, (*weights_)[micro_batch]);
  } else {
    gradient = std::move(gradients_in_.at(micro_batch));
    gradients_in_.erase(micro_batch);
  }
  // A first stage whose parameters are all frozen has nothing to do.
  if (live.output.requires_grad()) torch::autograd::backward({live.output}, {gradient});
  if (live.input.defined()) gradients_out_[micro_batch] = live.input.grad();
}

void Executor::exchange(const std::vector<Action::Message>& messages) {
  const TimedPhase timed(Phase::kCommunication, chunks_[0]->device());
  std::vector<Group::Message> round;
  int sent_batch = -1;
  for (const auto& message : messages) {
    const auto batch = message.micro_batch;
    at::Tensor tensor;
    if (message.send && message.gradient) {
      tensor = gradients_out_.at(batch).contiguous();
      gradients_out_.erase(batch);
    } else if (message.send) {
      tensor = live_.at(batch).output.detach().contiguous();
      sent_batch = batch;
    } else {
      tensor = empty_hidden((*batches_)[batch]);
      if (message.gradient) {
        gradients_in_[batch] = tensor;
      } else {
        live_[batch].input = tensor;
      }
    }
    round.push_back({tensor, message.peer, message.send});
  }
  auto pending = chunks_[0]->parallel().pp.exchange(std::move(round));
  for (const auto& message : messages) {
    if (!message.send && !message.gradient) live_.at(message.micro_batch).input.requires_grad_(true);
  }
  // An activation has arrived once its gradient comes back; gradients are given a few rounds.
  if (sent_batch >= 0) {
    live_.at(sent_batch).sent = std::move(pending);
  } else if (pending) {
    sends_.push_back(std::move(pending));
    constexpr size_t kUnderWay = 4;
    if (sends_.size() > kUnderWay) sends_.pop_front();
  }
}

at::Tensor Executor::evaluate(const std::vector<ForwardInput>& batches, const std::vector<double>& weights) {
  at::NoGradGuard no_grad;
  auto& model = *chunks_[0];
  const auto& pp = model.parallel().pp;
  auto loss = at::zeros({}, at::TensorOptions(model.device()).dtype(at::kDouble));
  std::deque<std::shared_ptr<Group::Pending>> sends;
  for (size_t i = 0; i < batches.size(); ++i) {
    auto input = batches[i];
    if (!model.place().post_process) input.labels = at::Tensor();
    if (!model.place().pre_process) {
      input.hidden = empty_hidden(batches[i]);
      pp.exchange({{input.hidden, pp.rank() - 1, false}});
    }
    const auto output = model.forward(input);
    if (model.place().post_process) {
      loss += output.to(at::kDouble).sum() * weights[i];
    } else {
      sends.push_back(pp.exchange({{output.contiguous(), pp.rank() + 1, true}}));
    }
  }
  return loss;
}

}  // namespace mcore_bridge
