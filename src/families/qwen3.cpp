#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  values["qk_layernorm"] = true;
  set_attention_biases(values, hf);
  set_window_on_some_layers(values, hf);
}

}  // namespace

FamilySpec qwen3_family() {
  return {.name = "qwen3",
          .model_types = {"qwen3"},
          .configure = configure,
          .layer_weights = dense_decoder_layer,
          .documentation = "Qwen3 dense models",
          .hf_defaults = {{"rms_norm_eps", 1e-6},
                          {"max_position_embeddings", 32768},
                          {"num_key_value_heads", 32},
                          {"head_dim", 128},
                          {"sliding_window", 4096},
                          {"max_window_layers", 28}}};
}

}  // namespace mcore_bridge
