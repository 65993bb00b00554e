// One function per family file, listed by hand: a visible table that no linker drops.
#pragma once

#include "families/family.h"

namespace mcore_bridge {

FamilySpec llama_family();
FamilySpec mistral_family();
FamilySpec qwen2_family();
FamilySpec qwen3_family();

/// Window fields from `sliding_window`; the layers that have it from `layer_types` when the config lists them.
void configure_sliding_window(Json& values, const Json& hf);

}  // namespace mcore_bridge
