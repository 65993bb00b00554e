#include "families/table.h"

namespace mcore_bridge {
FamilySpec mistral_family() {
  return {.name = "mistral",
          .model_types = {"mistral"},
          .configure = configure_sliding_window,
          .layer_weights = dense_decoder_layer,
          .documentation = "Mistral 7B and its descendants, with or without a sliding window"};
}

}  // namespace mcore_bridge
