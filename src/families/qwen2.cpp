#include "families/table.h"

namespace mcore_bridge {
namespace {

void configure(Json& values, const Json& hf) {
  values["add_qkv_bias"] = true;  // always, and never on the output projection
  if (hf.value("use_sliding_window", false)) configure_sliding_window(values, hf);
}

}  // namespace

FamilySpec qwen2_family() {
  return {.name = "qwen2",
          .model_types = {"qwen2"},
          .configure = configure,
          .layer_weights = dense_decoder_layer,
          .documentation = "Qwen1.5, Qwen2 and Qwen2.5 dense models"};
}

}  // namespace mcore_bridge
