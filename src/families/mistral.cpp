#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  set_biases(values, false, false, false);
  set_window_on_all_layers(values, hf);  // Transformers' Mistral reads no layer_types
}

}  // namespace

FamilySpec mistral_family() {
  return {.name = "mistral",
          .model_types = {"mistral"},
          .configure = configure,
          .layer_weights = dense_decoder_layer,
          .documentation = "Mistral 7B and its descendants, with or without a sliding window",
          .hf_defaults = {{"rms_norm_eps", 1e-6},
                          {"max_position_embeddings", 131072},
                          {"num_key_value_heads", 8},
                          {"sliding_window", 4096}}};
}

}  // namespace mcore_bridge
