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
  std::string hf_prefix = "model.";  ///< before layers, the embedding and norm
  /// What Transformers' config class assumes for keys that config.json leaves out, where ModelConfig's default differs.
  Json hf_defaults = Json::object();
  std::string hf_embedding = "embed_tokens";
};

/// The visible table.
const std::vector<FamilySpec>& families();
/// Throws ValueError naming the known types.
const FamilySpec& family_of(const ModelConfig& config);
const FamilySpec* find_family(const std::string& model_type);

/// Layer rules most families share; names relative as in FamilySpec::layer_weights.
std::vector<WeightRule> gqa_attention_rules(const ModelConfig& config);
/// `hf`: what Hugging Face calls the MLP.
std::vector<WeightRule> gated_mlp_rules(const ModelConfig& config, const std::string& hf = "mlp");
/// The matrices of a gated MLP of this width, with their biases: below `name` here and `hf` there.
std::vector<WeightRule> gated_mlp_matrices(const ModelConfig& config, const std::string& name, const std::string& hf,
                                           int64_t width);
/// The bias that goes with a matrix rule, whose tensors are "x.weight", or "x" with the bias "x_bias".
WeightRule bias_of(WeightRule matrix);
WeightRule::Init norm_init(const ModelConfig& config);
/// Both, as a FamilySpec::layer_weights.
std::vector<WeightRule> dense_decoder_layer(const ModelConfig& config, int64_t layer);

/// What Hugging Face calls the parts of a layer with experts; names relative to the layer.
struct MoeNames {
  std::string router = "mlp.gate.weight";
  std::string expert_bias = "mlp.gate.e_score_correction_bias";
  bool expert_bias_leading_one = false;  ///< kept as [1, experts]
  std::string gate = "mlp.experts.{e}.gate_proj.weight", up = "mlp.experts.{e}.up_proj.weight",
              down = "mlp.experts.{e}.down_proj.weight";
  std::string shared = "mlp.shared_experts", shared_gate = "mlp.shared_expert_gate.weight";
  std::string dense = "mlp";  ///< layers without experts
  /// One tensor of all experts [experts, in, out] per matrix: gate and up one after the other, or taking turns. `gate`
  /// and `up` are the same name then.
  enum class Stacked { kNo, kTransposed, kTransposedInterleaved } stacked = Stacked::kNo;
};
/// Norm, router, experts and shared experts of a layer.
std::vector<WeightRule> moe_rules(const ModelConfig& config, const MoeNames& names);
/// Attention, then experts or a dense MLP as the layer is.
std::vector<WeightRule> moe_decoder_layer(const ModelConfig& config, int64_t layer, const MoeNames& names);
/// The same with the usual names, as a FamilySpec::layer_weights.
std::vector<WeightRule> usual_moe_decoder_layer(const ModelConfig& config, int64_t layer);

/// What a chunk holds.
struct ChunkPlace {
  LayerRange layers;
  bool pre_process = true, post_process = true;
  int ep_rank = 0, ep_size = 1;  ///< which of the experts
};

/// All rules of one chunk with full names: local layer index on the engine's side, global on Hugging Face's.
std::vector<WeightRule> chunk_weights(const ModelConfig& config, const ChunkPlace& place);

}  // namespace mcore_bridge
