#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json&) {
  // attention_bias puts a bias on all four projections.
  values["add_attention_proj_bias"] = values.value("add_qkv_bias", false);
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t) {
  auto rules = gqa_attention_rules(config);
  for (auto& rule : gated_mlp_rules(config)) rules.push_back(std::move(rule));
  return rules;
}

}  // namespace

FamilySpec llama_family() {
  return {.name = "llama",
          .model_types = {"llama"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "Llama 2 and 3, Yi, SmolLM2 and others of the llama type"};
}

}  // namespace mcore_bridge
