#include "layers/transformer_layer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "layers/offload.h"
#include "layers/recompute.h"
#include "parallel/random.h"

namespace mcore_bridge {

TransformerLayer::TransformerLayer(const ModelConfig& config, ParallelStatePtr parallel,
                                   at::TensorOptions tensor_options, int64_t layer)
    : dropout_(config.hidden_dropout),
      // Shards of the sequence differ between tensor ranks, whole sequences do not.
      stream_(config.sequence_parallel ? RandomStream::kSplit : RandomStream::kReplicated),
      recompute_(config.recomputes(config.is_moe_layer(layer) ? "moe" : "mlp")),
      parallel_(parallel),
      hidden_size_(config.hidden_size),
      sequence_split_(config.sequence_parallel ? parallel->tp.size() : 1),
      attention_(std::make_unique<SelfAttention>(config, parallel, tensor_options, layer)) {
  if (!config.is_moe_layer(layer)) {
    mlp_ = std::make_unique<MLP>(config, parallel, tensor_options, MLP::Options{.width = config.ffn_hidden_size});
    return;
  }
  moe_norm_ = std::make_unique<Norm>(NormOptions{.size = config.hidden_size,
                                                 .epsilon = config.layernorm_epsilon,
                                                 .zero_centered = config.layernorm_zero_centered_gamma,
                                                 .sum_over_tp = config.sequence_parallel && parallel->tp.size() > 1},
                                     tensor_options);
  moe_ = std::make_unique<MoELayer>(config, parallel, tensor_options);
}

std::vector<Module::Child> TransformerLayer::children() const {
  if (mlp_) return {{"self_attention", attention_.get()}, {"mlp", mlp_.get()}};
  return {{"self_attention", attention_.get()}, {"pre_mlp_layernorm", moe_norm_.get()}, {"mlp", moe_.get()}};
}

at::Tensor TransformerLayer::dropped(const at::Tensor& x) const {
  if (dropout_ == 0 || !training()) return x;
  const RandomScope scope(stream_, *parallel_, x.device());
  return at::dropout(x, dropout_, true);
}

at::Tensor TransformerLayer::forward(const at::Tensor& x_sbh, const AttentionInput& input, double loss_share,
                                     bool unused) {
  const auto [attended, residual] = attention_->forward(x_sbh, input);
  const auto update = dropped(attended);
  const bool again = recompute_ && at::GradMode::is_enabled() && update.requires_grad();
  if (mlp_ && !again) {
    const auto [output, x] = mlp_->forward(residual, update, unused);
    return x + dropped(output);
  }
  const auto x = residual + update;
  ActivationOffload::keep(x);
  auto block = [this, loss_share](const at::Tensor& y) {
    return mlp_ ? mlp_->forward(y, {}, recomputing()).y : moe_->forward(moe_norm_->forward(y), loss_share);
  };
  return x + dropped(again ? recompute(block, x) : block(x));
}

Footprint TransformerLayer::footprint(const ActivationShape& shape) const {
  auto result = attention_->footprint(shape);
  const auto hidden = shape.tokens() * hidden_size_ * shape.element / sequence_split_;
  const auto mask = dropout_ > 0 ? hidden / (shape.fused ? shape.element : 1) : 0;
  if (result.output_grad) result.saved += mask;
  result.workspace += hidden;  // the residual's gradient
  const bool again = recompute_ && result.output_grad;
  auto second = shape;
  second.input_grad = shape.input_grad || result.output_grad;
  second.input_kept = again;  // x + attention is new
  auto local = second;
  local.sequence /= sequence_split_;
  auto mlp = mlp_ ? mlp_->footprint(second) : moe_norm_->footprint(local);
  if (moe_) {
    if (mlp.output_grad && !again) mlp.offloaded += hidden;  // what the norm keeps
    second.input_kept = false;
    second.input_grad = mlp.output_grad;
    mlp += moe_->footprint(second);
  }
  if (again) {
    mlp.recompute(hidden);
    mlp.offloaded = hidden;
  }
  if (mlp.output_grad) mlp.saved += mask;
  result += mlp;
  return result;
}

}  // namespace mcore_bridge
