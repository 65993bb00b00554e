#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  set_biases(values, true, false, false);
  set_window_on_some_layers(values, hf);
}

}  // namespace

FamilySpec qwen2_family() {
  return {.name = "qwen2",
          .model_types = {"qwen2"},
          .configure = configure,
          .layer_weights = dense_decoder_layer,
          .documentation = "Qwen1.5, Qwen2 and Qwen2.5 dense models",
          .hf_defaults = {{"rms_norm_eps", 1e-6},
                          {"max_position_embeddings", 32768},
                          {"num_key_value_heads", 32},
                          {"sliding_window", 4096},
                          {"max_window_layers", 28}}};
}

}  // namespace mcore_bridge
