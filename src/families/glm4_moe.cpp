#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  set_biases(values, json_bool(hf, "attention_bias", false, kFile), false, false);
  set_sigmoid_router(values);
  values["moe_router_weight_in_fp32"] = true;
  set_layers_behind_dense_ones(values, hf);
  set_shared_experts(values, hf, "n_shared_experts");
}

}  // namespace

FamilySpec glm4_moe_family() {
  return {.name = "glm4_moe",
          .model_types = {"glm4_moe"},
          .configure = configure,
          .layer_weights = usual_moe_decoder_layer,
          .documentation = "GLM-4.5, 4.6 and 4.7 (the layers of multi-token prediction are not loaded)",
          .hf_defaults = {{"rms_norm_eps", 1e-5},
                          {"max_position_embeddings", 131072},
                          {"num_key_value_heads", 8},
                          {"partial_rotary_factor", 0.5},
                          {"use_qk_norm", false},
                          {"n_routed_experts", 128},
                          {"num_experts_per_tok", 8},
                          {"n_shared_experts", 1},
                          {"moe_intermediate_size", 1408},
                          {"n_group", 1},
                          {"topk_group", 1},
                          {"norm_topk_prob", true},
                          {"routed_scaling_factor", 1.0},
                          {"first_k_dense_replace", 1}}};
}

}  // namespace mcore_bridge
