#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  set_attention_biases(values, hf);
  values["qk_layernorm"] = true;
  set_sigmoid_router(values);
  values["moe_router_weight_in_fp32"] = true;
  set_layers_behind_dense_ones(values, hf);
  set_shared_experts(values, hf, "n_shared_experts");
  set_window_by_layer_types(values, hf);
}

}  // namespace

FamilySpec dots1_family() {
  return {.name = "dots1",
          .model_types = {"dots1"},
          .configure = configure,
          .layer_weights = usual_moe_decoder_layer,
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
