#include "config/validate_moe.h"

#include <algorithm>

#include "core/one_of.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

void supported(const std::string& field, const std::string& value, std::initializer_list<const char*> allowed) {
  one_of("ModelConfig." + field, value, allowed, "is not supported by this version; supported:");
}

void check_dense(const ModelConfig& c) {
  MCB_CHECK(c.expert_model_parallel_size == 1, "ModelConfig.expert_model_parallel_size: ", c.expert_model_parallel_size,
            " needs a mixture-of-experts model, and this one has no experts (num_moe_experts)");
  const auto expert_tensor = c.expert_tensor_parallel_size.value_or(1);
  MCB_CHECK(expert_tensor == 1 || expert_tensor == c.tensor_model_parallel_size,
            "ModelConfig.expert_tensor_parallel_size: ", expert_tensor,
            " needs a mixture-of-experts model, and this one has no experts (num_moe_experts); leave it out");
}

void check_router(const ModelConfig& c) {
  const auto experts = *c.num_moe_experts, topk = c.moe_router_topk;
  MCB_CHECK(topk >= 1 && topk <= experts, "ModelConfig.moe_router_topk: ", topk, " must be in 1..", experts,
            " (num_moe_experts)");
  const auto groups = c.moe_router_num_groups.value_or(1), best = c.moe_router_group_topk.value_or(groups);
  MCB_CHECK(groups >= 1 && experts % groups == 0, "ModelConfig.moe_router_num_groups: ", groups,
            " does not divide num_moe_experts ", experts);
  MCB_CHECK(best >= 1 && best <= groups, "ModelConfig.moe_router_group_topk: ", best, " must be in 1..", groups,
            " (moe_router_num_groups)");
  MCB_CHECK(topk <= best * (experts / groups), "ModelConfig.moe_router_topk: ", topk, " experts are more than the ",
            best * (experts / groups), " of moe_router_group_topk ", best, " groups");
  supported("moe_router_score_function", c.moe_router_score_function, {"softmax", "sigmoid"});
  supported("moe_router_dtype", c.moe_router_dtype.value_or("none"), {"none", "fp32", "fp64"});
  MCB_CHECK(c.moe_router_bias_update_rate >= 0,
            "ModelConfig.moe_router_bias_update_rate: ", c.moe_router_bias_update_rate, " must not be negative");
  MCB_CHECK(c.moe_router_norm_min >= 0, "ModelConfig.moe_router_norm_min: ", c.moe_router_norm_min,
            " must not be negative");
}

void check_balance(const ModelConfig& c) {
  const auto& types = c.moe_router_load_balancing_type;
  for (const auto& type : types) {
    supported("moe_router_load_balancing_type", type,
              {"aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"});
    MCB_CHECK(types.size() == 1 || type.ends_with("aux_loss"), "ModelConfig.moe_router_load_balancing_type: '", type,
              "' stands alone");
    MCB_CHECK(std::count(types.begin(), types.end(), type) == 1, "ModelConfig.moe_router_load_balancing_type: names '",
              type, "' twice");
  }
  const auto& weights = c.moe_aux_loss_coeff;
  MCB_CHECK(weights.size() <= 1 || weights.size() == types.size(), "ModelConfig.moe_aux_loss_coeff: ", weights.size(),
            " numbers for ", types.size(), " load balancing types; give one, or one for each");
  for (const auto weight : weights)
    MCB_CHECK(weight >= 0, "ModelConfig.moe_aux_loss_coeff: ", weight, " must not be negative");
  const bool weighted = std::any_of(weights.begin(), weights.end(), [](double weight) { return weight > 0; });
  MCB_CHECK(!weighted || types.empty() || types[0].ends_with("aux_loss"),
            "ModelConfig.moe_aux_loss_coeff: has no effect with "
            "moe_router_load_balancing_type '",
            types.empty() ? "" : types[0], "'; set it to 0");
  MCB_CHECK(c.moe_z_loss_coeff.value_or(0) >= 0, "ModelConfig.moe_z_loss_coeff: ", *c.moe_z_loss_coeff,
            " must not be negative");
  MCB_CHECK(types != StringList{"sinkhorn"} || (!c.moe_router_enable_expert_bias && !c.moe_router_num_groups),
            "ModelConfig.moe_router_load_balancing_type: sinkhorn makes its own choice; it goes with neither an expert "
            "bias nor groups");
}

void check_capacity(const ModelConfig& c) {
  supported("moe_token_drop_policy", c.moe_token_drop_policy, {"probs", "position"});
  MCB_CHECK(c.moe_expert_capacity_factor.value_or(1) > 0,
            "ModelConfig.moe_expert_capacity_factor: ", *c.moe_expert_capacity_factor,
            " must be positive; leave it out to drop nothing");
  MCB_CHECK(!c.moe_pad_expert_input_to_capacity || c.moe_expert_capacity_factor,
            "ModelConfig.moe_pad_expert_input_to_capacity: needs moe_expert_capacity_factor");
}

void check_dispatch(const ModelConfig& c) {
  MCB_CHECK(c.moe_token_dispatcher_type != "flex",
            "ModelConfig.moe_token_dispatcher_type: 'flex' (DeepEP) is not supported by this version; use alltoall");
  supported("moe_token_dispatcher_type", c.moe_token_dispatcher_type, {"alltoall", "allgather"});
}

}  // namespace

void check_moe(const ModelConfig& c) {
  if (!c.is_moe()) return;
  MCB_CHECK(*c.num_moe_experts > 0, "ModelConfig.num_moe_experts: ", *c.num_moe_experts, " must be at least 1");
  MCB_CHECK(c.moe_ffn_size() > 0, "ModelConfig.moe_ffn_hidden_size: ", c.moe_ffn_size(), " must be at least 1");
  MCB_CHECK(c.shared_expert_size() >= 0, "ModelConfig.moe_shared_expert_intermediate_size: ", c.shared_expert_size(),
            " must not be negative");
  MCB_CHECK(!c.moe_shared_expert_gate || c.shared_expert_size() > 0,
            "ModelConfig.moe_shared_expert_gate: there is no shared expert (moe_shared_expert_intermediate_size)");
  if (c.moe_layer_freq.every) {
    MCB_CHECK(*c.moe_layer_freq.every > 0, "ModelConfig.moe_layer_freq: ", *c.moe_layer_freq.every,
              " must be at least 1");
  } else if (!c.moe_layer_freq.empty()) {
    c.moe_layer_freq.expand(c.num_layers, 0, "moe_layer_freq");
  }
  check_router(c);
  check_balance(c);
  check_capacity(c);
  check_dispatch(c);
}

void check_moe_layout(const ModelConfig& c) {
  if (!c.is_moe()) return check_dense(c);
  const auto experts = *c.num_moe_experts, ep = c.expert_model_parallel_size;
  MCB_CHECK(experts % ep == 0, "ModelConfig.expert_model_parallel_size: ", ep, " does not divide num_moe_experts ",
            experts);
  const auto etp = c.expert_tensor_parallel_size.value_or(c.tensor_model_parallel_size);
  MCB_CHECK(c.moe_ffn_size() % etp == 0, "ModelConfig.expert_tensor_parallel_size: ", etp,
            " does not divide moe_ffn_hidden_size ", c.moe_ffn_size(),
            c.expert_tensor_parallel_size ? "" : " (it is tensor_model_parallel_size unless given; 1 always works)");
  MCB_CHECK(c.shared_expert_size() % c.tensor_model_parallel_size == 0, "tensor_model_parallel_size ",
            c.tensor_model_parallel_size, " does not divide moe_shared_expert_intermediate_size ",
            c.shared_expert_size());
  MCB_CHECK(c.tensor_model_parallel_size == 1 || c.sequence_parallel,
            "ModelConfig.sequence_parallel: a mixture of experts with tensor_model_parallel_size ",
            c.tensor_model_parallel_size, " needs it, so that no token is routed twice; set sequence_parallel to true");
}

}  // namespace mcore_bridge
