// Options of a LoRA adapter, with PEFT's names and defaults where PEFT has them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mcore_bridge {

struct LoraOptions {
  int64_t r = 8;
  double lora_alpha = 32;
  double lora_dropout = 0.0;
  bool use_rslora = false;  ///< scale by alpha / sqrt(r) instead of alpha / r
  /// Module names to adapt: "all-linear", Megatron names (linear_qkv, linear_proj, linear_fc1, linear_fc2), Hugging
  /// Face names (q_proj, ...; a part of a fused matrix alone is possible) or any dotted suffix of either.
  std::vector<std::string> target_modules = {"all-linear"};
  /// Instead of the list: a regular expression that must match a whole module name, Megatron's or Hugging Face's.
  std::string target_regex;
  /// Modules trained in full and saved with the adapter (embed_tokens / word_embeddings, lm_head / output_layer,
  /// norms).
  std::vector<std::string> modules_to_save;
  uint64_t seed = 42;  ///< of the initial A
  double scaling() const;
  void validate() const;
};

}  // namespace mcore_bridge
