#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  set_biases(values, json_bool(hf, "qkv_bias", true, kFile), false, false);
  if (json_bool(hf, "use_sliding_window", false, kFile) && !json_find(hf, "layer_types")) {
    // Transformers' reading of old files: every other layer in front of max_window_layers.
    auto types = Json::array();
    for (int64_t i = 0; i < json_int(hf, "num_hidden_layers", 0, kFile); ++i)
      types.push_back(i % 2 == 0 && i < json_int(hf, "max_window_layers", 0, kFile) ? "sliding_attention"
                                                                                    : "full_attention");
    auto named = hf;
    named["layer_types"] = types;
    set_window_on_some_layers(values, named);
  } else {
    set_window_on_some_layers(values, hf);
  }
  set_sparse_step_layers(values, hf);
  values["moe_shared_expert_gate"] = true;
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(config, layer, {.shared = "mlp.shared_expert"});
}

}  // namespace

FamilySpec qwen2_moe_family() {
  return {.name = "qwen2_moe",
          .model_types = {"qwen2_moe"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "Qwen1.5-MoE and Qwen2-57B-A14B",
          .hf_defaults = {{"rms_norm_eps", 1e-6},
                          {"max_position_embeddings", 32768},
                          {"num_key_value_heads", 16},
                          {"norm_topk_prob", false},
                          {"num_experts", 60},
                          {"num_experts_per_tok", 4},
                          {"moe_intermediate_size", 1408},
                          {"shared_expert_intermediate_size", 5632},
                          {"sliding_window", 4096},
                          {"max_window_layers", 28}}};
}

}  // namespace mcore_bridge
