#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  values["qk_layernorm"] = true;
  values["add_attention_proj_bias"] = values.value("add_qkv_bias", false);
  if (hf.value("use_sliding_window", false)) configure_sliding_window(values, hf);
}

}  // namespace

FamilySpec qwen3_family() {
  return {.name = "qwen3",
          .model_types = {"qwen3"},
          .configure = configure,
          .layer_weights = dense_decoder_layer,
          .documentation = "Qwen3 dense models"};
}

}  // namespace mcore_bridge
