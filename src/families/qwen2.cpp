#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  values["add_qkv_bias"] = true;  // always, and never on the output projection
  if (hf.value("use_sliding_window", false)) configure_sliding_window(values, hf);
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t) {
  auto rules = gqa_attention_rules(config);
  for (auto& rule : gated_mlp_rules(config)) rules.push_back(std::move(rule));
  return rules;
}

}  // namespace

FamilySpec qwen2_family() {
  return {.name = "qwen2",
          .model_types = {"qwen2"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "Qwen1.5, Qwen2 and Qwen2.5 dense models"};
}

}  // namespace mcore_bridge
