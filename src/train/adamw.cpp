#include "train/adamw.h"

#include <ATen/ATen.h>

#include <cmath>

namespace mcore_bridge {

AdamW::AdamW(const GradBuffer& gradients, const OptimizerOptions& options) : options_(options), sets_(2) {
  at::NoGradGuard no_grad;
  sets_[0].weight_decay = options.weight_decay;
  for (const auto& parameter : gradients.parameters()) {
    const auto tensor = parameter.tensor.detach();
    const bool full = tensor.scalar_type() == at::kFloat;
    const auto fp32 = tensor.options().dtype(at::kFloat);
    ParameterState state{parameter.name, parameter.chunk, full ? tensor : tensor.to(at::kFloat), at::zeros(tensor.sizes(), fp32),
                         at::zeros(tensor.sizes(), fp32), !full};
    if (!step_.defined()) step_ = at::zeros({}, fp32);
    auto& set = sets_[parameter.traits.no_weight_decay ? 1 : 0];
    set.masters.push_back(state.master);
    set.grads.push_back(parameter.main_grad);
    set.exp_avgs.push_back(state.exp_avg);
    set.exp_avg_sqs.push_back(state.exp_avg_sq);
    set.steps.push_back(step_);
    if (!full) {
      low_precision_.push_back(tensor);
      their_masters_.push_back(state.master);
    }
    states_.push_back(std::move(state));
  }
}

void AdamW::step(double lr, const at::Tensor& grad_scale, const at::Tensor& skip) {
  at::NoGradGuard no_grad;
  if (!step_.defined()) return;
  step_.add_(1 - skip);
  for (auto& set : sets_) {
    if (set.masters.empty()) continue;
    at::_fused_adamw_(set.masters, set.grads, set.exp_avgs, set.exp_avg_sqs, {}, set.steps, lr, options_.adam_beta1,
                      options_.adam_beta2, set.weight_decay, options_.adam_eps, /*amsgrad=*/false, /*maximize=*/false,
                      grad_scale, skip);
  }
  if (!low_precision_.empty()) at::_foreach_copy_(low_precision_, their_masters_);
}

std::vector<StateSlice> AdamW::state() {
  std::vector<StateSlice> result;
  for (size_t i = 0; i < states_.size(); ++i) {
    const auto& s = states_[i];
    auto add = [&](const char* kind, const at::Tensor& values) {
      result.push_back({s.name, s.chunk, kind, 0, values.numel(), values.view({-1})});
    };
    if (s.low_precision) add("master", s.master);
    add("exp_avg", s.exp_avg);
    add("exp_avg_sq", s.exp_avg_sq);
  }
  return result;
}

int64_t AdamW::steps() const { return step_.defined() ? std::llround(step_.item<double>()) : 0; }

void AdamW::set_steps(int64_t steps) {
  if (step_.defined()) step_.fill_(static_cast<double>(steps));
}

void AdamW::state_loaded() {
  at::NoGradGuard no_grad;
  if (!low_precision_.empty()) at::_foreach_copy_(low_precision_, their_masters_);
}

}  // namespace mcore_bridge
