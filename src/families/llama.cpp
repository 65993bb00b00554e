#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json&) {
  // attention_bias puts a bias on all four projections.
  values["add_attention_proj_bias"] = values.value("add_qkv_bias", false);
}

}  // namespace

FamilySpec llama_family() {
  return {.name = "llama",
          .model_types = {"llama"},
          .configure = configure,
          .layer_weights = dense_decoder_layer,
          .documentation = "Llama 2 and 3, Yi, SmolLM2 and others of the llama type"};
}

}  // namespace mcore_bridge
