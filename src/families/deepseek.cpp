#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  set_attention_biases(values, hf);
  set_layers_behind_dense_ones(values, hf);
  set_shared_experts(values, hf, "n_shared_experts");
}

}  // namespace

FamilySpec deepseek_family() {
  return {.name = "deepseek",
          .model_types = {"deepseek"},
          .configure = configure,
          .layer_weights = usual_moe_decoder_layer,
          .documentation = "DeepSeekMoE 16B (model code of its own on the hub)",
          .hf_defaults = {{"rms_norm_eps", 1e-6},
                          {"max_position_embeddings", 2048},
                          {"norm_topk_prob", false},
                          {"scoring_func", "softmax"}}};
}

}  // namespace mcore_bridge
