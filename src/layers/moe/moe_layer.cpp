#include "layers/moe/moe_layer.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "layers/offload.h"

namespace mcore_bridge {

SharedExperts::SharedExperts(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options)
    : mlp_(config, parallel, tensor_options, {.width = config.shared_expert_size(), .norm = false}),
      sum_over_tp_(config.sequence_parallel && parallel->tp.size() > 1),
      sequence_split_(config.sequence_parallel ? parallel->tp.size() : 1) {
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

Footprint SharedExperts::footprint(const ActivationShape& shape) const {
  auto inner = shape;
  if (!gate_weight_.defined()) return mlp_.footprint(inner);
  const auto tokens = shape.tokens() / sequence_split_, hidden = gate_weight_.size(1);
  const bool learns = gate_weight_.requires_grad(), gate_grad = learns || shape.input_grad;
  int64_t saved = learns && !shape.input_kept ? tokens * hidden * shape.element : 0;
  const auto offloaded = saved;
  inner.input_kept = shape.input_kept || learns;
  auto result = mlp_.footprint(inner);
  if (gate_grad || result.output_grad) saved += tokens * shape.element;  // the gate
  if (gate_grad) saved += tokens * hidden * shape.element;               // what it scales
  const auto flops = 2.0 * static_cast<double>(tokens * hidden);
  result.forward_flops += flops;
  result.backward_flops += flops * ((learns ? 1 : 0) + (shape.input_grad ? 1 : 0));
  result.saved += saved;
  result.offloaded += offloaded;
  result.output_grad = result.output_grad || gate_grad;
  return result;
}

MoELayer::MoELayer(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options)
    : topk_(config.moe_router_topk),
      hidden_size_(config.hidden_size),
      experts_count_(*config.num_moe_experts),
      spread_(parallel->tp_cp.size()),
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
  ActivationOffload::keep(x_sbh);
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
  auto local = shape;  // of the tokens this rank routes
  local.sequence /= sequence_split_;
  const auto tokens = local.tokens(), row = hidden_size_ * shape.element;
  auto result = router_.footprint(local);
  DispatchLoad load{.tokens = tokens,
                    .hidden = hidden_size_,
                    .topk = topk_,
                    .element = shape.element,
                    .weight_element = router_.score_element(),
                    .capacity = router_.capacity(tokens),
                    .kept = tokens * topk_,
                    .input_grad = shape.input_grad,
                    .weights_grad = result.output_grad,
                    .experts_grad = experts_.learns()};
  if (load.capacity > 0) load.kept = std::min(load.kept, load.capacity * experts_count_ / spread_);
  const auto dispatch = dispatcher_.footprint(load);
  auto inner = shape;
  inner.input_grad = dispatch.rows_grad;
  inner.input_kept = false;
  // Backward frees the rows that were weighted before it comes to the experts.
  const auto weighted = dispatch.cost.saved > dispatch.permuted * row ? dispatch.permuted * row : 0;
  const auto experts = experts_.footprint(dispatch.rows, dispatch.computed, weighted, inner);
  result += dispatch.cost;
  result += experts;
  // The gradients of all tokens and of their places; as many again where places travel. Then those of the experts, and
  // the input's.
  const auto combined = dispatch.tokens * row + dispatch.permuted * row,
             travelled = 2 * dispatch.permuted * row - weighted;
  result.workspace =
      std::max({combined, travelled, experts.workspace, router_.footprint(local).workspace - experts.saved});
  result.workspace += 2 * tokens * row;
  result.output_grad = dispatch.output_grad || experts.output_grad;
  if (shared_) {
    inner = shape;
    inner.input_kept = shape.input_kept || router_.trains();
    const bool grad = result.output_grad;
    // Backward comes to them between the experts and the router: nothing is gone yet at either's worst moment.
    const auto routed = result.workspace;
    result += shared_->footprint(inner);
    result.workspace = std::max(result.workspace, routed);
    result.unread_flops = 0;  // the sum with the routed experts' reads it
    result.output_grad = result.output_grad || grad;
  }
  return result;
}

}  // namespace mcore_bridge
