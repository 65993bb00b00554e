#include "layers/weight_gradients.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "layers/given.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::atomic<int> splitting{0};
std::atomic<WeightGradients*> deferred{nullptr};

at::Tensor rows(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }

struct SplitLinear : torch::autograd::Function<SplitLinear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
    context->save_for_backward({x, weight, bias.value_or(at::Tensor())});
    return at::linear(x, weight, bias);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1], &bias = saved[2], &grad = grads[0];
    variable_list result(3);
    if (!grad.defined()) return result;
    if (context->needs_input_grad(0)) result[0] = at::matmul(grad, weight);
    if (context->needs_input_grad(1))
      result[1] = WeightGradients::now_or_later(weight, [x, grad] { return at::mm(rows(grad).t(), rows(x)); });
    if (bias.defined() && context->needs_input_grad(2))
      result[2] = WeightGradients::now_or_later(bias, [grad] { return rows(grad).sum(0); });
    return result;
  }
};

}  // namespace

at::Tensor linear_map(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const bool trains = weight.requires_grad() || (bias.defined() && bias.requires_grad());
  if (splitting.load() > 0 && trains && at::GradMode::is_enabled()) return SplitLinear::apply(x, weight, given(bias));
  return at::linear(x, weight, given(bias));
}

WeightGradients* WeightGradients::current() { return deferred.load(); }

at::Tensor WeightGradients::now_or_later(const at::Tensor& tensor, std::function<at::Tensor()> gradient) {
  auto* later = current();
  if (!later) return gradient();
  later->add(tensor, std::move(gradient));
  return {};
}

at::Tensor WeightGradients::now_or_later(const at::Tensor& parameter, const std::shared_ptr<MainGradient>& main,
                                         std::function<void(const at::Tensor&, bool)> into) {
  return now_or_later(parameter, [main, into = std::move(into)] {
    contribute(*main, into);
    return at::Tensor();
  });
}

void WeightGradients::add(at::Tensor tensor, std::function<at::Tensor()> gradient) {
  const std::lock_guard lock(mutex_);
  tensors_.push_back(std::move(tensor));
  gradients_.push_back(std::move(gradient));
}

bool WeightGradients::holds(const at::Tensor& tensor) {
  const std::lock_guard lock(mutex_);
  return std::any_of(tensors_.begin(), tensors_.end(), [&](const auto& held) { return held.is_same(tensor); });
}

void WeightGradients::run() {
  const auto tensors = std::exchange(tensors_, {});
  variable_list wanting, gradients, contributed;
  {
    at::NoGradGuard no_grad;
    for (size_t i = 0; i < tensors.size(); ++i) {
      auto gradient = gradients_[i]();
      gradients_[i] = nullptr;  // its inputs are not needed any more
      if (gradient.defined()) {
        wanting.push_back(tensors[i]);
        gradients.push_back(std::move(gradient));
      } else {
        contributed.push_back(tensors[i]);
      }
    }
  }
  gradients_.clear();
  if (!wanting.empty()) torch::autograd::backward(wanting, gradients);
  for (const auto& parameter : contributed) {  // what autograd tells of others
    if (const auto& hook = torch::autograd::impl::post_acc_grad_hooks(parameter)) (*hook)(parameter);
  }
}

SplitBackward::SplitBackward() { ++splitting; }
SplitBackward::~SplitBackward() { --splitting; }

DeferWeightGradients::DeferWeightGradients(WeightGradients& store) {
  WeightGradients* none = nullptr;
  TORCH_INTERNAL_ASSERT(deferred.compare_exchange_strong(none, &store), "two split backward passes at once");
}
DeferWeightGradients::~DeferWeightGradients() { deferred = nullptr; }

at::Tensor weight_gradient(const at::Tensor& weight, const std::shared_ptr<MainGradient>& main, const at::Tensor& grad,
                           const at::Tensor& x) {
  if (!main) return WeightGradients::now_or_later(weight, [grad, x] { return at::mm(grad.t(), x); });
  return WeightGradients::now_or_later(weight, main, [grad, x](const at::Tensor& sum, bool accumulate) {
    accumulate_product(sum, grad, x, accumulate);
  });
}

}  // namespace mcore_bridge
