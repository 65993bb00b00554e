// ModelConfig::finalize: derived values, then every rule a config must keep.
#include <algorithm>

#include "config/json_value.h"
#include "config/layout_rules.h"
#include "config/pipeline_layout.h"
#include "config/rope_scaling.h"
#include "config/validate_moe.h"
#include "core/one_of.h"
#include "mcore_bridge/error.h"
#include "mcore_bridge/layouts.h"
#include "mcore_bridge/model_config.h"

namespace mcore_bridge {
namespace {

/// Features later versions bring; each line goes when its feature comes.
void check_supported(const ModelConfig& c) {
  auto only = [](const std::string& field, const std::string& value, std::initializer_list<const char*> allowed) {
    one_of("ModelConfig." + field, value, allowed, "is not supported by this version; supported:");
  };
  only("normalization", c.normalization, {"RMSNorm"});
  only("softmax_type", c.softmax_type, {"vanilla", "learnable"});
  only("position_embedding_type", c.position_embedding_type, {"rope", "none"});
  only("hidden_act", c.hidden_act, {"silu", "gelu", "gelu_tanh", "quick_gelu"});
  only("task_type", c.task_type, {"causal_lm"});
  MCB_CHECK(c.swiglu, "ModelConfig.swiglu: an MLP without gate is not supported by this version");
}

/// The numbers from 1 to `most` that `works` accepts.
template <class Works>
std::string numbers_that_work(int64_t most, Works works) {
  std::string text;
  for (int64_t n = 1; n <= most; ++n) {
    if (works(n)) text += (text.empty() ? "" : ", ") + std::to_string(n);
  }
  return text;
}

void check_ranges(const ModelConfig& c) {
  auto positive = [](const char* field, int64_t value) {
    MCB_CHECK(value > 0, "ModelConfig.", field, ": ", value, " must be at least 1",
              value == 0 ? " (is it missing in config.json?)" : "");
  };
  positive("num_layers", c.num_layers);
  positive("hidden_size", c.hidden_size);
  positive("ffn_hidden_size", c.ffn_hidden_size);
  positive("num_attention_heads", c.num_attention_heads);
  positive("num_query_groups", c.query_groups());
  positive("kv_channels", c.head_dim());
  positive("padded_vocab_size", c.padded_vocab_size);
  positive("tensor_model_parallel_size", c.tensor_model_parallel_size);
  positive("pipeline_model_parallel_size", c.pipeline_model_parallel_size);
  positive("virtual_pipeline_model_parallel_size", c.virtual_stages());
  positive("context_parallel_size", c.context_parallel_size);
  positive("expert_model_parallel_size", c.expert_model_parallel_size);
  positive("expert_tensor_parallel_size", c.expert_tensor_parallel_size.value_or(1));
  positive("max_position_embeddings", c.max_position_embeddings.value_or(1));
  positive("original_max_position_embeddings", c.original_max_position_embeddings.value_or(1));
  auto probability = [](const char* field, double value) {
    MCB_CHECK(value >= 0 && value < 1, "ModelConfig.", field, ": ", value, " must be in [0, 1)");
  };
  probability("attention_dropout", c.attention_dropout);
  probability("hidden_dropout", c.hidden_dropout);
  MCB_CHECK(c.layernorm_epsilon > 0, "ModelConfig.layernorm_epsilon: ", c.layernorm_epsilon, " must be positive");
  MCB_CHECK(c.rotary_base > 1, "ModelConfig.rotary_base: ", c.rotary_base, " must be above 1");
  MCB_CHECK(c.init_method_std >= 0, "ModelConfig.init_method_std: ", c.init_method_std, " must not be negative");
  const double share = c.partial_rotary_factor.value_or(c.rotary_percent);
  MCB_CHECK(share > 0 && share <= 1, "ModelConfig.rotary_percent: ", share, " must be in (0, 1]");
  MCB_CHECK(static_cast<int64_t>(static_cast<double>(c.head_dim()) * share) % 2 == 0,
            "ModelConfig.rotary_percent: ", share, " of kv_channels ", c.head_dim(),
            " is not an even number of rotated entries");
  MCB_CHECK(c.window_size.empty() || c.window_size.size() == 2, "ModelConfig.window_size: needs (left, right), found ",
            c.window_size.size(), " numbers");
  MCB_CHECK(c.window_size.empty() || (c.window_size[0] >= -1 && (c.window_size[1] == 0 || c.window_size[1] == -1)),
            "ModelConfig.window_size: left must be -1 or more and right 0 (attention is causal)");
  MCB_CHECK(!c.attention_chunk_size || (*c.attention_chunk_size > 0 && c.window_size.empty()),
            "ModelConfig.attention_chunk_size: must be positive and goes with no window_size");
  MCB_CHECK(!c.qk_layernorm_whole || c.qk_layernorm, "ModelConfig.qk_layernorm_whole: needs qk_layernorm");
  MCB_CHECK(!c.qk_l2_norm || !c.qk_layernorm, "ModelConfig.qk_l2_norm: excludes qk_layernorm");
  MCB_CHECK(c.softmax_type == "vanilla" || c.attention_dropout == 0,
            "ModelConfig.attention_dropout: attention sinks (softmax_type learnable) support none; set it to 0");
  MCB_CHECK(c.window_attn_skip_freq.empty() || !c.window_size.empty(),
            "ModelConfig.window_attn_skip_freq: is given without window_size");
  if (!c.window_attn_skip_freq.empty()) c.window_attn_skip_freq.expand(c.num_layers, 0, "window_attn_skip_freq");
  if (!c.no_rope_freq.empty()) c.no_rope_freq.expand(c.num_layers, 1, "no_rope_freq");
  MCB_CHECK(c.num_attention_heads % c.query_groups() == 0, "ModelConfig.num_query_groups: ", c.query_groups(),
            " does not divide num_attention_heads ", c.num_attention_heads);
  auto agrees = [&](const char* key, const char* field, double value) {
    const auto inside = json_number(c.rope_scaling, key, value, "ModelConfig.rope_scaling");
    MCB_CHECK(inside == value, "ModelConfig.rope_scaling: its ", key, " ", inside, " contradicts ", field, " ", value,
              "; give ", field, " alone");
  };
  agrees("rope_theta", "rotary_base", c.rotary_base);
  agrees("partial_rotary_factor", "rotary_percent", share);
  if (c.position_embedding_type == "rope") rope_frequencies(c, c.max_position_embeddings.value_or(1));
}

void check_recompute(const ModelConfig& c) {
  const auto granularity = c.recompute_granularity.value_or("none"), method = c.recompute_method.value_or("uniform");
  MCB_CHECK(granularity == "none" || granularity == "full" || granularity == "selective",
            "ModelConfig.recompute_granularity: '", granularity, "' is not one of full, selective, none");
  MCB_CHECK(method == "uniform" || method == "block", "ModelConfig.recompute_method: '", method,
            "' is not one of uniform, block");
  MCB_CHECK(granularity == "full" || (!c.recompute_method && !c.recompute_num_layers),
            "ModelConfig.recompute_method and recompute_num_layers need recompute_granularity 'full'");
  MCB_CHECK(c.recompute_num_layers.value_or(1) > 0, "ModelConfig.recompute_num_layers: must be at least 1");
  MCB_CHECK(granularity != "full" || method != "block" || c.recompute_num_layers,
            "ModelConfig.recompute_num_layers: recompute_method 'block' needs it");
  for (const auto& module : c.recompute_modules) {
    const bool known = module == "core_attn" || module == "mlp" || module == "moe" || module == "layernorm";
    const bool later = module == "moe_act" || module == "shared_experts" || module == "mla_up_proj";
    MCB_CHECK(!later, "ModelConfig.recompute_modules: '", module,
              "' is not supported by this version; use moe (router, experts and shared experts), or leave it out");
    MCB_CHECK(known, "ModelConfig.recompute_modules: '", module, "' is not one of core_attn, mlp, moe, layernorm");
    MCB_CHECK(module != "moe" || c.is_moe(), "ModelConfig.recompute_modules: 'moe' needs a mixture-of-experts model");
  }
  MCB_CHECK(!c.cpu_offloading || granularity != "full",
            "ModelConfig.cpu_offloading: recompute_granularity 'full' leaves nothing to offload; use one of them");
  MCB_CHECK(c.cpu_offloading_num_layers >= 0, "ModelConfig.cpu_offloading_num_layers: ", c.cpu_offloading_num_layers,
            " must not be negative");
  MCB_CHECK(!c.cpu_offloading || c.cpu_offloading_num_layers > 0,
            "ModelConfig.cpu_offloading: cpu_offloading_num_layers says of how many layers, and is 0");
}

void check_fp8(const ModelConfig& c) {
  MCB_CHECK(
      c.fp8 || !c.fp8_param,
      "ModelConfig.fp8_param keeps the weights of layers that compute in FP8, and fp8 is off; set fp8 (--fp8_format) "
      "too, or leave out fp8_param (--fp8_param_gather)");
  if (!c.fp8) return;  // the other fields say nothing then
  one_of("ModelConfig.fp8", *c.fp8, {"e4m3", "hybrid"});
  MCB_CHECK(c.fp8_recipe != "mxfp8",
            "ModelConfig.fp8_recipe: 'mxfp8' is not supported by this version; use tensorwise, "
            "delayed or (Hopper) blockwise");
  one_of("ModelConfig.fp8_recipe", c.fp8_recipe, {"tensorwise", "delayed", "blockwise"});
  one_of("ModelConfig.fp8_amax_compute_algo", c.fp8_amax_compute_algo, {"max", "most_recent"});
  MCB_CHECK(c.fp8_amax_history_len > 0, "ModelConfig.fp8_amax_history_len: ", c.fp8_amax_history_len,
            " must be at least 1");
  MCB_CHECK(!c.is_moe(),
            "ModelConfig.fp8: experts' products are not computed in FP8 by this version; leave out fp8 for "
            "mixture-of-experts models");
  MCB_CHECK(!c.tp_comm_overlap,
            "ModelConfig.tp_comm_overlap: exchanges beside FP8 products are not supported by this "
            "version; leave out tp_comm_overlap or fp8");
  for (const auto count : {c.num_layers_at_start_in_bf16, c.num_layers_at_end_in_bf16})
    MCB_CHECK(count >= 0, "ModelConfig.num_layers_at_start_in_bf16, num_layers_at_end_in_bf16: ", count,
              " must not be negative");
}

void check_tensor_parallel(const ModelConfig& c) {
  const auto tp = c.tensor_model_parallel_size, heads = c.num_attention_heads, groups = c.query_groups();
  // Where every layer has experts, expert_tensor_parallel_size splits them instead.
  bool no_dense_mlp = c.is_moe();
  for (int64_t layer = 0; layer < c.num_layers; ++layer) no_dense_mlp = no_dense_mlp && c.is_moe_layer(layer);
  const auto shares_groups = [&](int64_t n) { return groups % n == 0 || n % groups == 0; };
  const auto advice = [&] {
    return "; use one of " + numbers_that_work(heads, [&](int64_t n) {
             return heads % n == 0 && (no_dense_mlp || c.ffn_hidden_size % n == 0) && shares_groups(n);
           });
  };
  auto divides = [&](const char* field, int64_t value) {
    MCB_CHECK(value % tp == 0, "tensor_model_parallel_size ", tp, " does not divide ", field, " ", value, advice());
  };
  divides("num_attention_heads", heads);
  if (!no_dense_mlp) divides("ffn_hidden_size", c.ffn_hidden_size);
  MCB_CHECK(shares_groups(tp), "tensor_model_parallel_size ", tp, " and num_query_groups ", groups,
            ": one must divide the other", advice());
}

void check_context_parallel(const ModelConfig& c) {
  MCB_CHECK(
      c.context_parallel_size == 1 || c.softmax_type == "vanilla" || c.cp_comm_type != "a2a",
      "ModelConfig.cp_comm_type: a2a does not support attention sinks (softmax_type learnable); use p2p or all_gather");
  MCB_CHECK(!c.tp_comm_overlap || c.sequence_parallel || c.tensor_model_parallel_size == 1,
            "ModelConfig.tp_comm_overlap: needs sequence_parallel, whose gathers and reductions it overlaps");
  const auto cp = c.context_parallel_size;
  const auto& type = c.cp_comm_type;
  MCB_CHECK(
      type != "a2a+p2p",
      "ModelConfig.cp_comm_type: 'a2a+p2p' is not supported by this version; use p2p (any number of heads) or a2a");
  MCB_CHECK(type == "p2p" || type == "all_gather" || type == "a2a", "ModelConfig.cp_comm_type: '", type,
            "' is not one of p2p, all_gather, a2a");
  if (cp == 1) return;
  if (type == "a2a") {
    const auto tp = c.tensor_model_parallel_size;
    const auto heads = c.num_attention_heads / tp, groups = std::max<int64_t>(1, c.query_groups() / tp);
    MCB_CHECK(heads % cp == 0 && groups % cp == 0,
              "ModelConfig.cp_comm_type: 'a2a' splits heads: context_parallel_size ", cp, " does not divide the ",
              heads, " query and ", groups, " key/value heads of a tensor-parallel rank; use ",
              numbers_that_work(groups, [&](int64_t n) { return heads % n == 0 && groups % n == 0; }),
              ", or cp_comm_type p2p or all_gather");
  } else {
    MCB_CHECK(c.attention_dropout == 0, "ModelConfig.attention_dropout: ", c.attention_dropout, " with cp_comm_type '",
              type, "' is not supported; use cp_comm_type a2a, or attention_dropout 0");
  }
}

}  // namespace

void check_layout_rules(const ModelConfig& c) {
  check_moe_layout(c);
  check_tensor_parallel(c);
  check_context_parallel(c);
  check_pipeline(c);
}

void ModelConfig::finalize() {
  MCB_CHECK(!(fp16 && bf16), "ModelConfig: fp16 and bf16 exclude each other");
  MCB_CHECK(!(fp16 && params_dtype == at::kBFloat16) && !(bf16 && params_dtype == at::kHalf),
            "ModelConfig: ", fp16 ? "fp16" : "bf16", " contradicts params_dtype ", fp16 ? "bfloat16" : "float16");
  if (fp16) params_dtype = at::kHalf;
  if (bf16) params_dtype = at::kBFloat16;
  fp16 = params_dtype == at::kHalf;
  bf16 = params_dtype == at::kBFloat16;
  if (add_bias_linear) add_qkv_bias = add_attention_proj_bias = add_mlp_bias = true;
  if (tensor_model_parallel_size == 1) sequence_parallel = false;
  if (partial_rotary_factor) rotary_percent = *partial_rotary_factor;
  if (num_attention_heads > 0) {
    if (!num_query_groups) num_query_groups = num_attention_heads;
    if (!kv_channels) kv_channels = hidden_size / num_attention_heads;
  }
  derive_virtual_stages(*this);
  check_supported(*this);
  check_ranges(*this);
  check_moe(*this);
  if (fp8 && (fp8->empty() || *fp8 == "none")) fp8.reset();
  check_fp8(*this);
  check_recompute(*this);
  check_layout(*this);
}

}  // namespace mcore_bridge
