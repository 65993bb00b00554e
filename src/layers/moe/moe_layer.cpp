#include "layers/moe/moe_layer.h"

#include <ATen/ATen.h>

namespace mcore_bridge {

SharedExperts::SharedExperts(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options)
    : mlp_(config, parallel, tensor_options, {.width = config.shared_expert_size(), .norm = false}),
      sum_over_tp_(config.sequence_parallel && parallel->tp.size() > 1) {
  if (config.moe_shared_expert_gate)
    gate_weight_ = at::empty({1, config.hidden_size}, tensor_options).requires_grad_(true);
}

std::vector<NamedParameter> SharedExperts::own_parameters() const {
  if (!gate_weight_.defined()) return {};
  return {{"gate_weight", gate_weight_, {.sum_over_tp = sum_over_tp_}}};
}

at::Tensor SharedExperts::forward(const at::Tensor& x_sbh) {
  const auto y = mlp_.forward(x_sbh, {}).y;
  return gate_weight_.defined() ? y * at::linear(x_sbh, gate_weight_).sigmoid() : y;
}

MoELayer::MoELayer(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options)
    : topk_(config.moe_router_topk),
      hidden_size_(config.hidden_size),
      expert_width_(config.moe_ffn_size() / parallel->etp.size()),
      sequence_split_(config.sequence_parallel ? parallel->tp.size() : 1),
      router_(config, parallel, tensor_options),
      dispatcher_(parallel, {.experts = *config.num_moe_experts,
                             .kind = config.moe_token_dispatcher_type == "allgather" ? Dispatcher::Kind::kAllGather
                                                                                     : Dispatcher::Kind::kAllToAll,
                             .weights_on_input = config.moe_apply_probs_on_input,
                             .pad_to_capacity = config.moe_pad_expert_input_to_capacity}),
      experts_(config, parallel, tensor_options) {
  if (config.shared_expert_size() > 0) shared_ = std::make_unique<SharedExperts>(config, parallel, tensor_options);
}

std::vector<Module::Child> MoELayer::children() const {
  auto* self = const_cast<MoELayer*>(this);
  std::vector<Child> result{{"router", &self->router_}, {"experts", &self->experts_}};
  if (shared_) result.push_back({"shared_experts", shared_.get()});
  return result;
}

at::Tensor MoELayer::forward(const at::Tensor& x_sbh, double loss_share) {
  auto routed = router_.forward(x_sbh, loss_share);
  at::Tensor shared;
  auto meanwhile = [&] {
    if (shared_) shared = shared_->forward(x_sbh);
  };
  const auto dispatched = dispatcher_.dispatch(x_sbh.flatten(0, 1), std::move(routed), meanwhile);
  const auto y = dispatcher_.combine(experts_.forward(dispatched.rows, dispatched.groups), dispatched);
  const auto out = y.view(x_sbh.sizes());
  return shared_ ? out + shared : out;
}

Footprint MoELayer::footprint(const ActivationShape& shape) const {
  Footprint result;
  const auto etp = expert_width_ > 0 ? dispatcher_.expert_tensor_ranks() : 1;
  const auto rows = shape.tokens() / sequence_split_ * topk_ * etp;
  const auto hidden = rows * hidden_size_ * shape.element, wide = rows * expert_width_ * shape.element;
  // Dispatched rows, both halves of the first product, the activation, the second product's rows.
  result.saved = hidden + 2 * wide + wide + hidden;
  result.workspace = hidden + 2 * wide;
  const auto trained = experts_.trained_matrices();
  result.forward_flops = 6.0 * static_cast<double>(rows) * static_cast<double>(hidden_size_ * expert_width_);
  result.backward_flops = result.forward_flops * (trained ? 2 : 1);
  if (shared_) {
    auto inner = shape;
    inner.input_kept = true;
    result += shared_->footprint(inner);
  }
  result.output_grad = true;
  return result;
}

}  // namespace mcore_bridge
