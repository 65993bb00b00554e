#include <algorithm>

#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  set_attention_biases(values, hf);
  values["rotary_interleaved"] = true;
  values["qk_layernorm"] = false;
  values["qk_l2_norm"] = json_bool(hf, "use_qk_norm", true, kFile);
  values["moe_ffn_hidden_size"] = values.at("ffn_hidden_size");
  values["moe_shared_expert_intermediate_size"] = values.at("ffn_hidden_size");
  values["ffn_hidden_size"] = json_int(hf, "intermediate_size_mlp", 16384, kFile);
  values["moe_router_score_function"] = "sigmoid";
  values["moe_router_pre_softmax"] = true;
  values["moe_apply_probs_on_input"] = true;
  const auto step = json_int(hf, "interleave_moe_layer_step", 1, kFile);
  const auto* named = json_find(hf, "moe_layers");
  set_moe_layers(values, hf, [&](int64_t layer) {
    if (!named) return (layer + 1) % step == 0;
    return std::find(named->begin(), named->end(), layer) != named->end();
  });
  if (const auto* chunk = json_find(hf, "attention_chunk_size")) values["attention_chunk_size"] = *chunk;
  if (json_bool(hf, "attn_temperature_tuning", true, kFile)) {
    values["attn_scale"] = json_find(hf, "attn_scale") ? hf.at("attn_scale") : Json(0.1);
    values["floor_scale"] = json_find(hf, "floor_scale") ? hf.at("floor_scale") : Json(8192);
  }
  // 1: RoPE, in spite of the name.
  const auto interval = json_int(hf, "no_rope_layer_interval", 4, kFile);
  const auto* rope = json_find(hf, "no_rope_layers");
  Json without = Json::array();
  for (int64_t i = 0; i < json_int(hf, "num_hidden_layers", 0, kFile); ++i) {
    const bool turns = rope && !rope->empty() ? rope->at(static_cast<size_t>(i)) != 0 : (i + 1) % interval != 0;
    without.push_back(turns ? 0 : 1);
  }
  values["no_rope_freq"] = without;
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(config, layer,
                           {.router = "feed_forward.router.weight",
                            .gate = "feed_forward.experts.gate_up_proj",
                            .up = "feed_forward.experts.gate_up_proj",
                            .down = "feed_forward.experts.down_proj",
                            .shared = "feed_forward.shared_expert",
                            .dense = "feed_forward",
                            .stacked = MoeNames::Stacked::kTransposed});
}

}  // namespace

FamilySpec llama4_text_family() {
  return {.name = "llama4_text",
          .model_types = {"llama4_text"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "Llama 4, text only",
          .hf_defaults = {{"rms_norm_eps", 1e-5},
                          {"max_position_embeddings", 131072},
                          {"num_key_value_heads", 8},
                          {"head_dim", 128},
                          {"rope_theta", 500000.0},
                          {"num_local_experts", 16},
                          {"num_experts_per_tok", 1},
                          {"attention_chunk_size", 8192}}};
}

}  // namespace mcore_bridge
