#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  values["qk_layernorm"] = true;
  values["add_attention_proj_bias"] = values.value("add_qkv_bias", false);
  if (hf.value("use_sliding_window", false)) configure_sliding_window(values, hf);
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t) {
  auto rules = gqa_attention_rules(config);
  for (auto& rule : gated_mlp_rules(config)) rules.push_back(std::move(rule));
  return rules;
}

}  // namespace

FamilySpec qwen3_family() {
  return {.name = "qwen3",
          .model_types = {"qwen3"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "Qwen3 dense models"};
}

}  // namespace mcore_bridge
