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
      hidden_size_(config.hidden_size),
      sequence_split_(config.sequence_parallel ? parallel->tp.size() : 1),
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

Footprint TransformerLayer::footprint(const ActivationShape& shape) const {
  auto result = attention_->footprint(shape);
  const auto hidden = shape.tokens() * hidden_size_ * shape.element / sequence_split_;
  const auto mask = dropout_ > 0 ? hidden / (shape.fused ? shape.element : 1) : 0;
  if (result.output_grad) result.saved += mask;
  result.workspace += hidden;  // the residual's gradient
  const bool again = recompute_mlp_ && result.output_grad;
  auto second = shape;
  second.input_grad = shape.input_grad || result.output_grad;
  second.input_kept = again;  // x + attention is new
  auto mlp = mlp_->footprint(second);
  if (again) mlp.recompute(hidden);
  if (mlp.output_grad) mlp.saved += mask;
  result += mlp;
  return result;
}

}  // namespace mcore_bridge
