#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  const bool attention = json_bool(hf, "attention_bias", false, kFile);
  set_biases(values, attention, attention, false);
  values["qk_layernorm"] = true;
  values["qk_layernorm_whole"] = true;
  values["moe_ffn_hidden_size"] = values.at("ffn_hidden_size");
  set_window_on_all_layers(values, hf);
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(config, layer, {});
}

}  // namespace

FamilySpec olmoe_family() {
  return {.name = "olmoe",
          .model_types = {"olmoe"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "OLMoE",
          .hf_defaults = {{"rms_norm_eps", 1e-5},
                          {"max_position_embeddings", 4096},
                          {"num_experts", 64},
                          {"num_experts_per_tok", 8},
                          {"norm_topk_prob", false}}};
}

}  // namespace mcore_bridge
