// One function per family file, listed by hand: a visible table that no linker drops.
#pragma once

#include "families/family.h"

namespace mcore_bridge {

FamilySpec llama_family();
FamilySpec mistral_family();
FamilySpec qwen2_family();
FamilySpec qwen3_family();

/// Which linear layers have a bias, whatever the common key table made of the config's flags.
void set_biases(Json& values, bool qkv, bool attention_proj, bool mlp);
/// `sliding_window` on every layer; null: none.
void set_window_on_all_layers(Json& values, const Json& hf);
/// `sliding_window`, if `use_sliding_window`, on the layers that `layer_types` names, else from `max_window_layers` on.
void set_window_on_some_layers(Json& values, const Json& hf);

}  // namespace mcore_bridge
