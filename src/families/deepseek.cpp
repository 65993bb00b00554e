#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  const bool attention = json_bool(hf, "attention_bias", false, kFile);
  set_biases(values, attention, attention, false);
  set_layers_behind_dense_ones(values, hf);
  set_shared_experts(values, hf, "n_shared_experts");
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(config, layer, {});
}

}  // namespace

FamilySpec deepseek_family() {
  return {.name = "deepseek",
          .model_types = {"deepseek"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "DeepSeekMoE 16B (model code of its own on the hub)",
          .hf_defaults = {{"rms_norm_eps", 1e-6},
                          {"max_position_embeddings", 2048},
                          {"norm_topk_prob", false},
                          {"scoring_func", "softmax"}}};
}

}  // namespace mcore_bridge
