// The gated feed-forward block.
#pragma once

#include <memory>

#include "layers/activation.h"
#include "layers/linear.h"
#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

class MLP : public Module {
 public:
  MLP(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options);
  std::string kind() const override { return "MLP"; }
  std::vector<Child> children() const override { return {{"linear_fc1", fc1_.get()}, {"linear_fc2", fc2_.get()}}; }
  at::Tensor forward(const at::Tensor& x_sbh) {
    return fc2_->forward(gated_activation(fc1_->forward(x_sbh), activation_));
  }

 private:
  Activation activation_;
  std::unique_ptr<ParallelLinear> fc1_, fc2_;
};

}  // namespace mcore_bridge
