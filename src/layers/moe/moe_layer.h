// A mixture of experts in the place of an MLP: router, dispatcher, experts, shared experts.
#pragma once

#include <memory>
#include <optional>

#include "layers/mlp.h"
#include "layers/moe/dispatcher.h"
#include "layers/moe/experts.h"
#include "layers/moe/router.h"

namespace mcore_bridge {

/// Experts every token visits: an MLP, optionally behind a sigmoid gate of its own (gate_weight [1, h]).
class SharedExperts : public Module {
 public:
  SharedExperts(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options);
  std::string kind() const override { return "SharedExpertMLP"; }
  std::vector<Child> children() const override { return mlp_.children(); }
  std::vector<NamedParameter> own_parameters() const override;
  at::Tensor forward(const at::Tensor& x_sbh);
  Footprint footprint(const ActivationShape& shape) const override;

 private:
  MLP mlp_;
  at::Tensor gate_weight_;
  bool sum_over_tp_;
  int64_t sequence_split_;
};

class MoELayer : public Module {
 public:
  MoELayer(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options);
  std::string kind() const override { return "MoELayer"; }
  std::vector<Child> children() const override;
  /// x [s, b, h], normalised -> [s, b, h]. `loss_share` as in Router::forward.
  at::Tensor forward(const at::Tensor& x_sbh, double loss_share);
  /// Of an even load: every rank's experts take as many rows as its tokens have places.
  Footprint footprint(const ActivationShape& shape) const override;
  Router& router() { return router_; }

 private:
  int64_t topk_, hidden_size_, experts_count_, spread_, sequence_split_;
  Router router_;
  Dispatcher dispatcher_;
  Experts experts_;
  std::unique_ptr<SharedExperts> shared_;
};

}  // namespace mcore_bridge
