#include "families/table.h"

namespace mcore_bridge {
namespace {

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t) {
  auto rules = gqa_attention_rules(config);
  for (auto& rule : gated_mlp_rules(config)) rules.push_back(std::move(rule));
  return rules;
}

}  // namespace

FamilySpec mistral_family() {
  return {.name = "mistral",
          .model_types = {"mistral"},
          .configure = configure_sliding_window,
          .layer_weights = layer_weights,
          .documentation = "Mistral 7B and its descendants, with or without a sliding window"};
}

}  // namespace mcore_bridge
