#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

constexpr const char* kFile = "config.json";

void configure(Json& values, const Json& hf) {
  values["qk_layernorm"] = true;
  set_attention_biases(values, hf);
  if (json_bool(hf, "use_sliding_window", false, kFile)) set_window_on_all_layers(values, hf);
  set_sparse_step_layers(values, hf);
}

}  // namespace

FamilySpec qwen3_moe_family() {
  return {.name = "qwen3_moe",
          .model_types = {"qwen3_moe"},
          .configure = configure,
          .layer_weights = usual_moe_decoder_layer,
          .documentation = "Qwen3 mixture-of-experts models (30B-A3B, 235B-A22B, Coder)",
          .hf_defaults = {{"rms_norm_eps", 1e-6},
                          {"max_position_embeddings", 32768},
                          {"num_key_value_heads", 4},
                          {"norm_topk_prob", false},
                          {"num_experts_per_tok", 8},
                          {"moe_intermediate_size", 768},
                          {"sliding_window", 4096}}};
}

}  // namespace mcore_bridge
