#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  set_biases(values, false, false, false);
  set_window_on_all_layers(values, hf);
  values["moe_ffn_hidden_size"] = values.at("ffn_hidden_size");
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(config, layer,
                           {.router = "block_sparse_moe.gate.weight",
                            .gate = "block_sparse_moe.experts.{e}.w1.weight",
                            .up = "block_sparse_moe.experts.{e}.w3.weight",
                            .down = "block_sparse_moe.experts.{e}.w2.weight"});
}

}  // namespace

FamilySpec mixtral_family() {
  return {.name = "mixtral",
          .model_types = {"mixtral"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "Mixtral 8x7B and 8x22B",
          .hf_defaults = {{"rms_norm_eps", 1e-5},
                          {"max_position_embeddings", 131072},
                          {"num_key_value_heads", 8},
                          {"num_local_experts", 8},
                          {"num_experts_per_tok", 2},
                          {"intermediate_size", 14336},
                          {"rope_theta", 1e6}}};
}

}  // namespace mcore_bridge
