#include "config/unsupported.h"

#include <algorithm>
#include <numeric>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

struct Neutral {
  const char* name;
  std::vector<Json> values;  ///< accepted besides null; empty: any value, it is only a hint
};

const std::vector<Neutral>& table() {
  static const std::vector<Neutral> rows = {
      // Hints about speed: any value gives the same numbers.
      {"apply_rope_fusion", {}},
      {"bias_dropout_fusion", {}},
      {"bias_activation_fusion", {}},
      {"masked_softmax_fusion", {}},
      {"gradient_accumulation_fusion", {}},
      {"cross_entropy_loss_fusion", {}},
      {"attention_backend", {}},
      {"persist_layer_norm", {}},
      {"overlap_p2p_comm", {}},
      {"batch_p2p_comm", {}},
      {"deallocate_pipeline_outputs", {}},
      {"variable_seq_lengths", {}},
      {"use_cpu_initialization", {}},
      {"pipeline_dtype", {}},
      {"moe_grouped_gemm", {}},
      {"moe_permute_fusion", {}},
      {"moe_router_dtype", {}},
      {"moe_token_dispatcher_type", {}},
      {"apply_query_key_layer_scaling", {false}},
      {"calculate_per_token_loss", {}},
      {"vit_attn_impl", {}},
      {"tp_comm_overlap", {}},
      {"moe_shared_expert_overlap", {}},
      // Features of later versions: only what leaves them off.
      {"num_moe_experts", {}},
      {"moe_layer_freq", {1, "1"}},
      {"moe_ffn_hidden_size", {}},
      {"moe_router_topk", {}},
      {"moe_aux_loss_coeff", {0, 0.0}},
      {"moe_z_loss_coeff", {0, 0.0}},
      {"moe_shared_expert_intermediate_size", {0}},
      {"multi_latent_attention", {false}},
      {"linear_attention_freq", {}},
      {"experimental_attention_variant", {}},
      {"attention_output_gate", {false}},
      {"qk_l2_norm", {false}},
      {"mrope_section", {}},
      {"mrope_interleaved", {false}},
      {"quick_geglu", {false}},
      {"activation_func_clamp_value", {}},
      {"glu_linear_offset", {0, 0.0}},
      {"num_labels", {}},
      {"mlp_padding_free", {false}},
      {"mtp_num_layers", {0}},
      {"mtp_shared_weights", {false}},
      {"mtp_decoder_input_detach", {false}},
      {"fp8", {false}},
      {"fp8_recipe", {"delayed"}},
      {"fp8_param", {false}},
      {"fp4", {false}},
      {"cp_comm_type", {"p2p"}},
      {"pipeline_model_parallel_layout", {}},
      {"recompute_granularity", {"none"}},
      {"recompute_method", {}},
      {"recompute_num_layers", {}},
      {"recompute_modules", {}},
  };
  return rows;
}

/// Fields whose row above means "no value but null": the list of neutral values is empty and any value would matter.
bool only_null(const std::string& name) {
  static const char* const names[] = {"num_moe_experts",
                                      "moe_ffn_hidden_size",
                                      "linear_attention_freq",
                                      "experimental_attention_variant",
                                      "mrope_section",
                                      "activation_func_clamp_value",
                                      "num_labels",
                                      "pipeline_model_parallel_layout",
                                      "recompute_method",
                                      "recompute_num_layers"};
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const auto above = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row.back();
}

}  // namespace

void check_unsupported(const std::string& name, const Json& value) {
  for (const auto& row : table()) {
    if (name != row.name) continue;
    if (value.is_null() || (row.values.empty() && !only_null(name))) return;
    if (std::find(row.values.begin(), row.values.end(), value) != row.values.end()) return;
    std::string accepted = "null";
    for (const auto& neutral : row.values) accepted += ", " + neutral.dump();
    fail("ModelConfig.", name, ": ", value.dump(), " is not supported by this version (only ", accepted, ")");
  }
  auto candidates = field_names();
  for (const auto& row : table()) candidates.emplace_back(row.name);
  const auto nearest = *std::min_element(candidates.begin(), candidates.end(), [&](const auto& a, const auto& b) {
    return edit_distance(name, a) < edit_distance(name, b);
  });
  fail<KeyError>("ModelConfig has no field '", name, "'; did you mean '", nearest, "'?");
}

}  // namespace mcore_bridge
