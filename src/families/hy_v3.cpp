#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  set_attention_biases(values, hf, json_bool(hf, "mlp_bias", false, kFile));
  values["qk_layernorm"] = true;
  set_sigmoid_router(values);
  values["moe_router_weight_in_fp32"] = true;
  set_layers_behind_dense_ones(values, hf);
  set_shared_experts(values, hf, "num_shared_experts");
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(
      config, layer,
      {.router = "mlp.router.gate.weight", .expert_bias = "mlp.expert_bias", .shared = "mlp.shared_mlp"});
}

}  // namespace

FamilySpec hy_v3_family() {
  return {.name = "hy_v3",
          .model_types = {"hy_v3"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "Hunyuan 3 (the layers of multi-token prediction are not loaded)",
          .hf_defaults = {{"rms_norm_eps", 1e-5},
                          {"max_position_embeddings", 131072},
                          {"num_key_value_heads", 8},
                          {"head_dim", 128},
                          {"rope_theta", 11158840.0},
                          {"num_experts", 192},
                          {"num_experts_per_tok", 8},
                          {"num_shared_experts", 1},
                          {"moe_intermediate_size", 1536},
                          {"router_scaling_factor", 2.826},
                          {"first_k_dense_replace", 1}}};
}

}  // namespace mcore_bridge
