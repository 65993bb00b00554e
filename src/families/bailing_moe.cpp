#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  set_biases(values, json_bool(hf, "use_qkv_bias", false, kFile), json_bool(hf, "use_bias", false, kFile), false);
  if (json_string(hf, "score_function", "softmax", kFile) == "sigmoid") set_sigmoid_router(values);
  if (!json_bool(hf, "moe_router_enable_expert_bias", true, kFile)) values["moe_router_enable_expert_bias"] = false;
  set_layers_behind_dense_ones(values, hf);
  set_shared_experts(values, hf, "num_shared_experts");
}

/// Attention under Bailing's names; q, k and v are one tensor.
std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  auto rules = moe_decoder_layer(config, layer, {.expert_bias = "mlp.gate.expert_bias"});
  for (auto& rule : rules) {
    for (auto& name : rule.hf) {
      if (!name.starts_with("self_attn.")) continue;
      const auto leaf = name.substr(name.rfind('.'));
      if (rule.fuse == Fuse::kQkv) {
        name = "attention.query_key_value" + leaf;
      } else if (name.starts_with("self_attn.o_proj")) {
        name = "attention.dense" + leaf;
      } else {
        name = name.starts_with("self_attn.q_norm") ? "attention.query_layernorm.weight"
                                                    : "attention.key_layernorm.weight";
      }
    }
  }
  return rules;
}

}  // namespace

FamilySpec bailing_moe_family() {
  return {.name = "bailing_moe",
          .model_types = {"bailing_moe"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "Ling and Ring 2.0 (model code of their own on the hub)",
          .hf_defaults = {{"rms_norm_eps", 1e-6},
                          {"max_position_embeddings", 32768},
                          {"norm_topk_prob", true},
                          {"first_k_dense_replace", 0}},
          .hf_embedding = "word_embeddings"};
}

}  // namespace mcore_bridge
