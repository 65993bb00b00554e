#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  const bool attention = json_bool(hf, "attention_bias", false, kFile);
  set_biases(values, attention, attention, false);
  values["qk_layernorm"] = true;
  set_sigmoid_router(values);
  set_layers_behind_dense_ones(values, hf);
  set_shared_experts(values, hf, "n_shared_experts");
  set_window_by_layer_types(values, hf);
}

std::vector<WeightRule> layer_weights(const ModelConfig& config, int64_t layer) {
  return moe_decoder_layer(config, layer, {});
}

}  // namespace

FamilySpec dots1_family() {
  return {.name = "dots1",
          .model_types = {"dots1"},
          .configure = configure,
          .layer_weights = layer_weights,
          .documentation = "dots.llm1",
          .hf_defaults = {{"rms_norm_eps", 1e-6},
                          {"max_position_embeddings", 2048},
                          {"n_group", 1},
                          {"topk_group", 1},
                          {"norm_topk_prob", false},
                          {"routed_scaling_factor", 1.0},
                          {"sliding_window", 4096}}};
}

}  // namespace mcore_bridge
