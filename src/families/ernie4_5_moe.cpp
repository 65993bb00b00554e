#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  const bool bias = json_bool(hf, "use_bias", false, kFile);
  set_biases(values, bias, bias, bias);
  values["rotary_interleaved"] = true;
  values["moe_router_enable_expert_bias"] = true;
  values["moe_router_weight_in_fp32"] = true;
  const auto start = json_int(hf, "moe_layer_start_index", 1, kFile),
             end = json_int(hf, "moe_layer_end_index", -1, kFile),
             interval = json_int(hf, "moe_layer_interval", 1, kFile);
  set_moe_layers(values, hf, [&](int64_t layer) {
    return layer >= start && (end < 0 || layer <= end) && (layer + 1) % interval == 0;
  });
  set_shared_experts(values, hf, "moe_num_shared_experts");
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(config, layer,
                           {.expert_bias = "mlp.moe_statics.e_score_correction_bias", .expert_bias_leading_one = true});
}

}  // namespace

FamilySpec ernie4_5_moe_family() {
  return {.name = "ernie4_5_moe",
          .model_types = {"ernie4_5_moe"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "ERNIE 4.5 mixtures of experts",
          .hf_defaults = {{"rms_norm_eps", 1e-5},
                          {"max_position_embeddings", 131072},
                          {"num_key_value_heads", 4},
                          {"rope_theta", 500000.0},
                          {"tie_word_embeddings", true},
                          {"moe_num_experts", 64},
                          {"moe_k", 6},
                          {"moe_num_shared_experts", 2},
                          {"moe_intermediate_size", 1536},
                          {"moe_norm_min", 1e-12}}};
}

}  // namespace mcore_bridge
