// AdamW with fp32 master weights: https://arxiv.org/abs/1711.05101.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "mcore_bridge/trainer.h"
#include "train/grad_buffer.h"
#include "train/optimizer_state.h"

namespace mcore_bridge {

class AdamW : public Optimizer {
 public:
  /// What a checkpoint of the optimizer holds, one per trainable parameter. `master` is the parameter itself when that
  /// is fp32.
  struct ParameterState {
    std::string name;
    int chunk = 0;
    at::Tensor master, exp_avg, exp_avg_sq;  ///< fp32, the parameter's shape
    bool low_precision = false;              ///< the master is a tensor of its own
  };

  AdamW(const GradBuffer& gradients, const OptimizerOptions& options);

  /// One update. `grad_scale`: what gradients are divided by first (clipping), fp32 scalar; `skip`: fp32 scalar, 1
  /// leaves everything as it is (a non-finite step). Both on the parameters' device: the host does not wait.
  void step(double lr, const at::Tensor& grad_scale, const at::Tensor& skip);

  const std::vector<ParameterState>& states() const { return states_; }
  std::vector<StateSlice> state() override;
  int64_t steps() const override;
  void set_steps(int64_t steps) override;
  void state_loaded() override;
  Json scalars() const override { return Json::object(); }
  void set_scalars(const Json& values) override {}

 private:
  /// Parameters that share a weight decay, as the lists the fused kernel takes.
  struct Set {
    double weight_decay = 0;
    std::vector<at::Tensor> masters, grads, exp_avgs, exp_avg_sqs, steps;
  };
  OptimizerOptions options_;
  std::vector<ParameterState> states_;
  std::vector<Set> sets_;
  std::vector<at::Tensor> low_precision_, their_masters_;
  at::Tensor step_;  ///< fp32 scalar: updates done, shared by all parameters
};

}  // namespace mcore_bridge
