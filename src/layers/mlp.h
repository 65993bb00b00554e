// The gated feed-forward block.
#pragma once

#include <memory>

#include "layers/activation.h"
#include "layers/linear.h"
#include "layers/offload.h"
#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

class MLP : public Module {
 public:
  struct Options {
    int64_t width = 0;
    bool norm = true;  ///< in front, inside linear_fc1
  };
  MLP(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options, Options options);
  std::string kind() const override { return "MLP"; }
  std::vector<Child> children() const override { return {{"linear_fc1", fc1_.get()}, {"linear_fc2", fc2_.get()}}; }
  Footprint footprint(const ActivationShape& shape) const override;
  /// The block's output for norm(x + delta), and x + delta itself: see LinearOutput. `delta` may be undefined.
  /// `unused`: nobody reads the output, see LinearPlan.
  LinearOutput forward(const at::Tensor& x_sbh, const at::Tensor& delta, bool unused = false) {
    const auto [gate_up, sum] = fc1_->forward(x_sbh, delta);
    ActivationOffload::keep(gate_up);
    return {fc2_->forward_gated(gate_up, activation_, unused), sum};
  }

 private:
  GatedOptions activation_;
  int64_t sequence_split_;
  std::unique_ptr<ParallelLinear> fc1_, fc2_;
};

}  // namespace mcore_bridge
