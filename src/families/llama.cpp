#include "config/json_value.h"
#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  set_attention_biases(values, hf, json_bool(hf, "mlp_bias", false, "config.json"));
}

}  // namespace

FamilySpec llama_family() {
  return {.name = "llama",
          .model_types = {"llama"},
          .configure = configure,
          .layer_weights = dense_decoder_layer,
          .documentation = "Llama 2 and 3, Yi, SmolLM2 and others of the llama type",
          .hf_defaults = {{"rms_norm_eps", 1e-6}, {"max_position_embeddings", 2048}}};
}

}  // namespace mcore_bridge
