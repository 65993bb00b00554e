#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  set_attention_biases(values, hf);
  values["qk_layernorm"] = true;
  values["qk_layernorm_whole"] = true;
  values["moe_ffn_hidden_size"] = values.at("ffn_hidden_size");
  set_window_on_all_layers(values, hf);
}

}  // namespace

FamilySpec olmoe_family() {
  return {.name = "olmoe",
          .model_types = {"olmoe"},
          .configure = configure,
          .layer_weights = usual_moe_decoder_layer,
          .documentation = "OLMoE",
          .hf_defaults = {{"rms_norm_eps", 1e-5},
                          {"max_position_embeddings", 4096},
                          {"num_experts", 64},
                          {"num_experts_per_tok", 8},
                          {"norm_topk_prob", false}}};
}

}  // namespace mcore_bridge
