#include "layers/transformer_layer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "layers/recompute.h"
#include "parallel/random.h"

namespace mcore_bridge {

TransformerLayer::TransformerLayer(const ModelConfig& config, ParallelStatePtr parallel,
                                   at::TensorOptions tensor_options, int64_t layer)
    : dropout_(config.hidden_dropout),
      // Shards of the sequence differ between tensor ranks, whole sequences do not.
      stream_(config.sequence_parallel ? RandomStream::kSplit : RandomStream::kReplicated),
      recompute_mlp_(config.recomputes("mlp")),
      parallel_(parallel),
      attention_(std::make_unique<SelfAttention>(config, parallel, tensor_options, layer)),
      mlp_(std::make_unique<MLP>(config, parallel, tensor_options)) {}

at::Tensor TransformerLayer::dropped(const at::Tensor& x) const {
  if (dropout_ == 0 || !training()) return x;
  const RandomScope scope(stream_, *parallel_, x.device());
  return at::dropout(x, dropout_, true);
}

at::Tensor TransformerLayer::forward(const at::Tensor& x_sbh, const AttentionInput& input) {
  const auto [attended, residual] = attention_->forward(x_sbh, input);
  const auto update = dropped(attended);
  if (recompute_mlp_ && at::GradMode::is_enabled() && update.requires_grad()) {
    const auto x = residual + update;
    return x + dropped(recompute([this](const at::Tensor& y) { return mlp_->forward(y, {}).y; }, x));
  }
  const auto [output, x] = mlp_->forward(residual, update);
  return x + dropped(output);
}

}  // namespace mcore_bridge
