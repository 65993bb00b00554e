// A model family as data: how its config.json reads and which Hugging Face tensors make its parameters.
#pragma once

#include <string>
#include <vector>

#include "mcore_bridge/model_config.h"
#include "plan/weight_rule.h"

namespace mcore_bridge {

struct FamilySpec {
  std::string name;                      ///< mcore_model_type
  std::vector<std::string> model_types;  ///< Hugging Face model_type values
  /// Adjusts the fields that the common key table filled (`values`, as ModelConfig JSON) from the text config.
  void (*configure)(Json& values, const Json& hf) = nullptr;
  /// Weights of the (global) decoder layer `layer`, names relative to "decoder.layers.N." and "model.layers.N.".
  std::vector<WeightRule> (*layer_weights)(const ModelConfig& config, int64_t layer) = nullptr;
  std::string documentation;         ///< one line for the model list
  std::string hf_prefix = "model.";  ///< before layers, embed_tokens and norm
  /// What Transformers' config class assumes for keys that config.json leaves out, where ModelConfig's default differs.
  Json hf_defaults = Json::object();
};

/// The visible table.
const std::vector<FamilySpec>& families();
/// Throws ValueError naming the known types.
const FamilySpec& family_of(const ModelConfig& config);
const FamilySpec* find_family(const std::string& model_type);

/// Layer rules most families share; names relative as in FamilySpec::layer_weights.
std::vector<WeightRule> gqa_attention_rules(const ModelConfig& config);
std::vector<WeightRule> gated_mlp_rules(const ModelConfig& config);
/// Both, as a FamilySpec::layer_weights.
std::vector<WeightRule> dense_decoder_layer(const ModelConfig& config, int64_t layer);

/// What a chunk holds.
struct ChunkPlace {
  LayerRange layers;
  bool pre_process = true, post_process = true;
};

/// All rules of one chunk with full names: local layer index on the engine's side, global on Hugging Face's.
std::vector<WeightRule> chunk_weights(const ModelConfig& config, const ChunkPlace& place);

}  // namespace mcore_bridge
