#include "layers/transformer_layer.h"

#include <ATen/ATen.h>

namespace mcore_bridge {

TransformerLayer::TransformerLayer(const ModelConfig& config, ParallelStatePtr parallel,
                                   at::TensorOptions tensor_options, int64_t layer)
    : dropout_(config.hidden_dropout),
      attention_(std::make_unique<SelfAttention>(config, parallel, tensor_options, layer)),
      mlp_(std::make_unique<MLP>(config, parallel, tensor_options)) {}

at::Tensor TransformerLayer::forward(const at::Tensor& x_sbh, const AttentionInput& input) {
  auto dropped = [&](const at::Tensor& y) { return dropout_ > 0 && training() ? at::dropout(y, dropout_, true) : y; };
  const auto x = x_sbh + dropped(attention_->forward(x_sbh, input));
  return x + dropped(mlp_->forward(x));
}

}  // namespace mcore_bridge
