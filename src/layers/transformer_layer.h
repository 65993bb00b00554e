// One decoder layer: x + attention(norm(x)), then + mlp(norm(.)); the norms live in the linear layers they feed, but
// for the one in front of a mixture of experts.
#pragma once

#include <memory>

#include "layers/attention/self_attention.h"
#include "layers/embedding.h"
#include "layers/mlp.h"
#include "layers/moe/moe_layer.h"
#include "layers/norm.h"
#include "parallel/random.h"

namespace mcore_bridge {

class TransformerLayer : public Module {
 public:
  /// `layer`: index in the whole model, from 0.
  TransformerLayer(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options,
                   int64_t layer);
  std::string kind() const override { return "TransformerLayer"; }
  std::vector<Child> children() const override;
  /// `loss_share`: see Router::forward. `unused`: nobody reads what comes back, only its graph matters.
  at::Tensor forward(const at::Tensor& x_sbh, const AttentionInput& input, double loss_share, bool unused = false);
  /// Null in a dense layer.
  MoELayer* moe() { return moe_.get(); }
  Footprint footprint(const ActivationShape& shape) const override;

 private:
  at::Tensor dropped(const at::Tensor& x) const;

  double dropout_;
  RandomStream stream_;
  bool recompute_;  ///< what follows attention
  ParallelStatePtr parallel_;
  int64_t hidden_size_, sequence_split_;
  std::unique_ptr<SelfAttention> attention_;
  std::unique_ptr<MLP> mlp_;        ///< a dense layer ...
  std::unique_ptr<Norm> moe_norm_;  ///< ... or one with experts
  std::unique_ptr<MoELayer> moe_;
};

}  // namespace mcore_bridge
