// One function per family file, listed by hand: a visible table that no linker drops.
#pragma once

#include <functional>

#include "families/family.h"

namespace mcore_bridge {

FamilySpec llama_family();
FamilySpec mistral_family();
FamilySpec qwen2_family();
FamilySpec qwen3_family();
FamilySpec qwen2_moe_family();
FamilySpec qwen3_moe_family();
FamilySpec mixtral_family();
FamilySpec olmoe_family();
FamilySpec dots1_family();
FamilySpec ernie4_5_moe_family();
FamilySpec glm4_moe_family();
FamilySpec minimax_m2_family();
FamilySpec gpt_oss_family();
FamilySpec hy_v3_family();
FamilySpec llama4_text_family();
FamilySpec bailing_moe_family();
FamilySpec deepseek_family();

/// Which linear layers have a bias, whatever the common key table made of the config's flags.
void set_biases(Json& values, bool qkv, bool attention_proj, bool mlp);
/// As `attention_bias` says, on q, k, v and o, and `mlp` in the MLP.
void set_attention_biases(Json& values, const Json& hf, bool mlp = false);
/// `sliding_window` on every layer; null: none.
void set_window_on_all_layers(Json& values, const Json& hf);
/// Experts in the layers of which `sparse` is true.
void set_moe_layers(Json& values, const Json& hf, const std::function<bool(int64_t layer)>& sparse);
/// Qwen's reading: every `decoder_sparse_step`-th layer but for `mlp_only_layers`.
void set_sparse_step_layers(Json& values, const Json& hf);
/// `mlp_layer_types` ("sparse" | "dense"), else all layers but the first `first_k_dense_replace`.
void set_layers_behind_dense_ones(Json& values, const Json& hf);
/// `count_key` shared experts of moe_intermediate_size each, as one MLP.
void set_shared_experts(Json& values, const Json& hf, const char* count_key);
/// DeepSeek-V3's router: sigmoid scores and a bias that takes part in the choice only.
void set_sigmoid_router(Json& values);
/// The layers that `layer_types` calls sliding_attention have the window `sliding_window`.
void set_window_by_layer_types(Json& values, const Json& hf);
/// `sliding_window`, if `use_sliding_window`, on the layers that `layer_types` names, else from `max_window_layers` on.
void set_window_on_some_layers(Json& values, const Json& hf);

}  // namespace mcore_bridge
