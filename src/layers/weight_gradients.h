// Backward in two halves: gradients of inputs now, gradients of weights later (zero-bubble pipeline schedules).
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "layers/main_gradient.h"

namespace mcore_bridge {

/// y = x W^T (+ bias), as at::linear. Inside a SplitBackward scope its backward can be split.
at::Tensor linear_map(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

/// Weight gradients that a backward pass has put aside.
class WeightGradients {
 public:
  /// Where a backward pass that runs now has to put them; null: it computes them itself.
  static WeightGradients* current();
  /// `gradient`() now, or undefined and put aside when the backward pass that runs wants it later. As add().
  static at::Tensor now_or_later(const at::Tensor& tensor, std::function<at::Tensor()> gradient);
  /// The same for a parameter with a main gradient, which `into` adds to: nothing is left for autograd.
  static at::Tensor now_or_later(const at::Tensor& parameter, const std::shared_ptr<MainGradient>& main,
                                 std::function<void(const at::Tensor& grad, bool accumulate)> into);

  /// `gradient` computes what backward adds to `tensor`, a parameter or something computed from parameters; undefined
  /// when it has added that to the parameter's main gradient.
  void add(at::Tensor tensor, std::function<at::Tensor()> gradient);
  /// Whether a gradient of exactly this tensor is put aside.
  bool holds(const at::Tensor& tensor);
  /// Computes and accumulates all of them, hooks of the parameters included, then forgets them.
  void run();

 private:
  std::mutex mutex_;  // backward of several devices runs on several threads
  std::vector<at::Tensor> tensors_;
  std::vector<std::function<at::Tensor()>> gradients_;
};

/// While it lives, `linear_map` builds graphs whose backward can be split. Both scopes hold for the whole process, as
/// backward runs on threads of its own.
class SplitBackward {
 public:
  SplitBackward();
  ~SplitBackward();
  SplitBackward(const SplitBackward&) = delete;
  SplitBackward& operator=(const SplitBackward&) = delete;
};

/// While it lives, backward passes put the weight gradients of such graphs into `store`.
class DeferWeightGradients {
 public:
  explicit DeferWeightGradients(WeightGradients& store);
  ~DeferWeightGradients();
  DeferWeightGradients(const DeferWeightGradients&) = delete;
  DeferWeightGradients& operator=(const DeferWeightGradients&) = delete;
};

/// grad^T x, the gradient of a matrix: for autograd, or undefined when it goes into `main` (null: there is none) or the
/// schedule wants it later.
at::Tensor weight_gradient(const at::Tensor& weight, const std::shared_ptr<MainGradient>& main, const at::Tensor& grad,
                           const at::Tensor& x);

}  // namespace mcore_bridge
