#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  const bool attention = json_bool(hf, "attention_bias", true, kFile);
  set_biases(values, attention, attention, false);
  values["add_bias_linear"] = true;
  values["softmax_type"] = "learnable";
  values["hidden_act"] = "quick_gelu";
  values["activation_func_clamp_value"] = json_find(hf, "swiglu_limit") ? hf.at("swiglu_limit") : Json(7.0);
  values["glu_linear_offset"] = 1.0;
  values["moe_ffn_hidden_size"] = values.at("ffn_hidden_size");
  auto named = hf;
  if (!json_find(hf, "layer_types")) {
    named["layer_types"] = Json::array();
    for (int64_t i = 0; i < json_int(hf, "num_hidden_layers", 0, kFile); ++i)
      named["layer_types"].push_back(i % 2 == 0 ? "sliding_attention" : "full_attention");
  }
  set_window_by_layer_types(values, named);
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(config, layer,
                           {.router = "mlp.router.weight",
                            .gate = "mlp.experts.gate_up_proj",
                            .up = "mlp.experts.gate_up_proj",
                            .down = "mlp.experts.down_proj",
                            .stacked = MoeNames::Stacked::kTransposedInterleaved});
}

}  // namespace

FamilySpec gpt_oss_family() {
  return {.name = "gpt_oss",
          .model_types = {"gpt_oss"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "gpt-oss (attention sinks; experts in bf16 or MXFP4)",
          .hf_defaults = {{"rms_norm_eps", 1e-5},
                          {"max_position_embeddings", 131072},
                          {"num_key_value_heads", 8},
                          {"head_dim", 64},
                          {"sliding_window", 128},
                          {"num_local_experts", 128},
                          {"num_experts_per_tok", 4}}};
}

}  // namespace mcore_bridge
