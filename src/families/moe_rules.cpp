// Weight rules of layers with experts.
#include "families/family.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using Init = WeightRule::Init;

void add_experts(std::vector<WeightRule>& rules, const ModelConfig& config, const MoeNames& names) {
  const bool stacked = names.stacked != MoeNames::Stacked::kNo;
  const ExpertLayout layout{.total = *config.num_moe_experts, .grouped = true, .stacked = stacked};
  const auto width = config.moe_ffn_size();
  rules.push_back(
      {.name = "mlp.experts.linear_fc1.weight",
       .hf = {names.gate, names.up},
       .rows = 2 * width,
       .cols = config.hidden_size,
       .shard = Shard::kColumn,
       .fuse = names.stacked == MoeNames::Stacked::kTransposedInterleaved ? Fuse::kInterleaved : Fuse::kGateUp,
       .experts = layout,
       .transposed = stacked});
  if (config.add_bias_linear) rules.push_back(bias_of(rules.back()));
  rules.push_back({.name = "mlp.experts.linear_fc2.weight",
                   .hf = {names.down},
                   .rows = config.hidden_size,
                   .cols = width,
                   .shard = Shard::kRow,
                   .experts = layout,
                   .transposed = stacked,
                   .init = Init::kScaledNormal});
  if (config.add_bias_linear) rules.push_back(bias_of(rules.back()));
}

void add_shared_experts(std::vector<WeightRule>& rules, const ModelConfig& config, const MoeNames& names) {
  for (auto& rule : gated_mlp_matrices(config, "mlp.shared_experts", names.shared, config.shared_expert_size()))
    rules.push_back(std::move(rule));
  if (!config.moe_shared_expert_gate) return;
  rules.push_back(
      {.name = "mlp.shared_experts.gate_weight", .hf = {names.shared_gate}, .rows = 1, .cols = config.hidden_size});
}

}  // namespace

std::vector<WeightRule> moe_rules(const ModelConfig& config, const MoeNames& names) {
  std::vector<WeightRule> rules = {{.name = "pre_mlp_layernorm.weight",
                                    .hf = {"post_attention_layernorm.weight"},
                                    .rows = config.hidden_size,
                                    .init = norm_init(config)},
                                   {.name = "mlp.router.weight",
                                    .hf = {names.router},
                                    .rows = *config.num_moe_experts,
                                    .cols = config.hidden_size,
                                    .float32 = config.moe_router_weight_in_fp32}};
  if (config.add_bias_linear) rules.push_back(bias_of(rules.back()));
  if (config.moe_router_enable_expert_bias) {
    rules.push_back({.name = "mlp.router.expert_bias",
                     .hf = {names.expert_bias},
                     .rows = *config.num_moe_experts,
                     .leading_one = names.expert_bias_leading_one,
                     .float32 = true,
                     .init = Init::kZero});
  }
  add_experts(rules, config, names);
  if (config.shared_expert_size() > 0) add_shared_experts(rules, config, names);
  return rules;
}

std::vector<WeightRule> moe_decoder_layer(const ModelConfig& config, int64_t layer, const MoeNames& names) {
  auto rules = gqa_attention_rules(config);
  auto block = config.is_moe_layer(layer) ? moe_rules(config, names) : gated_mlp_rules(config, names.dense);
  for (auto& rule : block) rules.push_back(std::move(rule));
  return rules;
}

std::vector<WeightRule> usual_moe_decoder_layer(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(config, layer, {});
}

}  // namespace mcore_bridge
