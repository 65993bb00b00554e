#include "config/unsupported.h"

#include <algorithm>
#include <numeric>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// A field that Megatron's configs have and ModelConfig has not. null is always accepted.
struct Known {
  const char* name;
  bool any_value;            ///< nothing depends on it here
  std::vector<Json> values;  ///< otherwise: the values that leave the feature off
};

Known hint(const char* name) { return {name, true, {}}; }
Known off(const char* name, std::vector<Json> values = {}) { return {name, false, std::move(values)}; }

const std::vector<Known>& table() {
  static const std::vector<Known> rows = {
      // Hints about speed, or choices this engine makes itself: any value gives the same numbers.
      hint("apply_rope_fusion"),
      hint("bias_dropout_fusion"),
      hint("bias_activation_fusion"),
      hint("masked_softmax_fusion"),
      hint("gradient_accumulation_fusion"),
      hint("cross_entropy_loss_fusion"),
      hint("attention_backend"),
      hint("persist_layer_norm"),
      hint("overlap_p2p_comm"),
      hint("batch_p2p_comm"),
      hint("deallocate_pipeline_outputs"),
      hint("variable_seq_lengths"),
      hint("use_cpu_initialization"),
      hint("pipeline_dtype"),
      hint("calculate_per_token_loss"),
      hint("vit_attn_impl"),

      // Features of later versions, and what sets each up; the latter has no effect while the former is off.
      hint("moe_grouped_gemm"),
      hint("moe_permute_fusion"),
      hint("moe_shared_expert_overlap"),
      off("multi_latent_attention", {false}),
      hint("q_lora_rank"),
      hint("kv_lora_rank"),
      hint("qk_head_dim"),
      hint("qk_pos_emb_head_dim"),
      hint("v_head_dim"),
      off("linear_attention_freq"),
      hint("linear_num_key_heads"),
      hint("linear_num_value_heads"),
      hint("linear_key_head_dim"),
      hint("linear_value_head_dim"),
      hint("linear_conv_kernel_dim"),
      hint("linear_decoupled_in_proj"),
      off("experimental_attention_variant"),
      hint("dsa_indexer_n_heads"),
      hint("dsa_indexer_head_dim"),
      hint("dsa_indexer_topk"),
      hint("dsa_indexer_loss_coeff"),
      hint("dsa_indexer_use_sparse_loss"),
      hint("dsa_indexer_rotary_interleaved"),
      off("mtp_num_layers", {0}),
      hint("mtp_loss_scaling_factor"),
      hint("mtp_shared_weights"),
      hint("mtp_decoder_input_detach"),
      hint("mtp_unroll_steps"),
      off("fp4", {false}),
      off("apply_query_key_layer_scaling", {false}),
      off("attention_output_gate", {false}),
      off("mrope_section"),
      off("mrope_interleaved", {false}),
      off("quick_geglu", {false}),
      off("num_labels"),
      off("mlp_padding_free", {false}),
  };
  return rows;
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
    if (value.is_null() || row.any_value) return;
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
