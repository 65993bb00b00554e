// One decoder layer: x + attention(norm(x)), then + mlp(norm(.)); the norms live in the linear layers they feed.
#pragma once

#include <memory>

#include "layers/attention/self_attention.h"
#include "layers/embedding.h"
#include "layers/mlp.h"
#include "parallel/random.h"

namespace mcore_bridge {

class TransformerLayer : public Module {
 public:
  /// `layer`: index in the whole model, from 0.
  TransformerLayer(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options,
                   int64_t layer);
  std::string kind() const override { return "TransformerLayer"; }
  std::vector<Child> children() const override { return {{"self_attention", attention_.get()}, {"mlp", mlp_.get()}}; }
  at::Tensor forward(const at::Tensor& x_sbh, const AttentionInput& input);
  Footprint footprint(const ActivationShape& shape) const override;

 private:
  at::Tensor dropped(const at::Tensor& x) const;

  double dropout_;
  RandomStream stream_;
  bool recompute_mlp_;
  ParallelStatePtr parallel_;
  int64_t hidden_size_, sequence_split_;
  std::unique_ptr<SelfAttention> attention_;
  std::unique_ptr<MLP> mlp_;
};

}  // namespace mcore_bridge
