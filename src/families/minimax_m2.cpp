#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  (void)hf;
  set_biases(values, false, false, false);
  values["qk_layernorm"] = true;
  values["qk_layernorm_whole"] = true;
  values["moe_ffn_hidden_size"] = values.at("ffn_hidden_size");
  set_sigmoid_router(values);
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(config, layer,
                           {.router = "block_sparse_moe.gate.weight",
                            .expert_bias = "block_sparse_moe.e_score_correction_bias",
                            .gate = "block_sparse_moe.experts.{e}.w1.weight",
                            .up = "block_sparse_moe.experts.{e}.w3.weight",
                            .down = "block_sparse_moe.experts.{e}.w2.weight"});
}

}  // namespace

FamilySpec minimax_m2_family() {
  return {.name = "minimax_m2",
          .model_types = {"minimax_m2"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "MiniMax M2",
          .hf_defaults = {{"rms_norm_eps", 1e-6},
                          {"max_position_embeddings", 196608},
                          {"num_key_value_heads", 8},
                          {"head_dim", 128},
                          {"rope_theta", 5e6},
                          {"num_local_experts", 256},
                          {"num_experts_per_tok", 8}}};
}

}  // namespace mcore_bridge
