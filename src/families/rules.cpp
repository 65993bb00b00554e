// Weight rules that families share, and the assembly of a chunk's rules.
#include "families/family.h"
#include "mcore_bridge/error.h"
#include "plan/plan.h"

namespace mcore_bridge {
namespace {

using Init = WeightRule::Init;

}  // namespace

Init norm_init(const ModelConfig& config) { return config.layernorm_zero_centered_gamma ? Init::kZero : Init::kOne; }

WeightRule bias_of(WeightRule matrix) {
  auto bias = [](std::string name) {
    return name.ends_with(".weight") ? name.replace(name.size() - 6, 6, "bias") : name + "_bias";
  };
  matrix.name = bias(std::move(matrix.name));
  for (auto& name : matrix.hf) name = bias(std::move(name));
  matrix.cols = 0;
  if (matrix.shard == Shard::kRow) matrix.shard = Shard::kReplicated;  // added once, after the sum over ranks
  matrix.init = Init::kZero;
  return matrix;
}

std::vector<WeightRule> gqa_attention_rules(const ModelConfig& config) {
  const HeadLayout heads{config.num_attention_heads, config.query_groups(), config.head_dim()};
  const auto width = heads.heads * heads.head_dim, kv_width = heads.groups * heads.head_dim;
  std::vector<WeightRule> rules = {
      {.name = "self_attention.linear_qkv.layer_norm_weight",
       .hf = {"input_layernorm.weight"},
       .rows = config.hidden_size,
       .init = norm_init(config)},
      {.name = "self_attention.linear_qkv.weight",
       .hf = {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"},
       .rows = width + 2 * kv_width,
       .cols = config.hidden_size,
       .shard = Shard::kColumn,
       .fuse = Fuse::kQkv,
       .heads = heads}};
  if (config.add_qkv_bias) rules.push_back(bias_of(rules.back()));
  if (config.qk_layernorm) {
    const bool whole = config.qk_layernorm_whole;
    rules.push_back({.name = "self_attention.q_layernorm.weight",
                     .hf = {"self_attn.q_norm.weight"},
                     .rows = whole ? width : heads.head_dim,
                     .init = norm_init(config)});
    rules.push_back({.name = "self_attention.k_layernorm.weight",
                     .hf = {"self_attn.k_norm.weight"},
                     .rows = whole ? kv_width : heads.head_dim,
                     .init = norm_init(config)});
  }
  if (config.softmax_type == "learnable") {
    rules.push_back({.name = "self_attention.core_attention.softmax_offset",
                     .hf = {"self_attn.sinks"},
                     .rows = heads.heads,
                     .shard = Shard::kColumn,
                     .init = Init::kZero});
  }
  rules.push_back({.name = "self_attention.linear_proj.weight",
                   .hf = {"self_attn.o_proj.weight"},
                   .rows = config.hidden_size,
                   .cols = width,
                   .shard = Shard::kRow,
                   .init = Init::kScaledNormal});
  if (config.add_attention_proj_bias) rules.push_back(bias_of(rules.back()));
  return rules;
}

std::vector<WeightRule> gated_mlp_matrices(const ModelConfig& config, const std::string& name, const std::string& hf,
                                           int64_t width) {
  std::vector<WeightRule> rules = {{.name = name + ".linear_fc1.weight",
                                    .hf = {hf + ".gate_proj.weight", hf + ".up_proj.weight"},
                                    .rows = 2 * width,
                                    .cols = config.hidden_size,
                                    .shard = Shard::kColumn,
                                    .fuse = Fuse::kGateUp}};
  if (config.add_mlp_bias) rules.push_back(bias_of(rules.back()));
  rules.push_back({.name = name + ".linear_fc2.weight",
                   .hf = {hf + ".down_proj.weight"},
                   .rows = config.hidden_size,
                   .cols = width,
                   .shard = Shard::kRow,
                   .init = Init::kScaledNormal});
  if (config.add_mlp_bias) rules.push_back(bias_of(rules.back()));
  return rules;
}

std::vector<WeightRule> gated_mlp_rules(const ModelConfig& config, const std::string& hf) {
  std::vector<WeightRule> rules = {{.name = "mlp.linear_fc1.layer_norm_weight",
                                    .hf = {"post_attention_layernorm.weight"},
                                    .rows = config.hidden_size,
                                    .init = norm_init(config)}};
  for (auto& rule : gated_mlp_matrices(config, "mlp", hf, config.ffn_hidden_size)) rules.push_back(std::move(rule));
  return rules;
}

std::vector<WeightRule> dense_decoder_layer(const ModelConfig& config, int64_t) {
  auto rules = gqa_attention_rules(config);
  for (auto& rule : gated_mlp_rules(config)) rules.push_back(std::move(rule));
  return rules;
}

std::vector<WeightRule> chunk_weights(const ModelConfig& config, const ChunkPlace& place) {
  const auto& family = family_of(config);
  auto vocabulary = [&](const char* name, const std::string& hf) {
    return WeightRule{.name = name,
                      .hf = {hf},
                      .rows = config.padded_vocab_size,
                      .cols = config.hidden_size,
                      .shard = Shard::kColumn,
                      .pad_rows = true};
  };
  const auto embedding_name = family.hf_prefix + family.hf_embedding + ".weight";
  std::vector<WeightRule> rules;
  if (place.pre_process) rules.push_back(vocabulary("embedding.word_embeddings.weight", embedding_name));
  for (int64_t local = 0; local < place.layers.count; ++local) {
    const auto layer = place.layers.first + local;
    for (auto& rule : family.layer_weights(config, layer)) {
      rule.name = "decoder.layers." + std::to_string(local) + "." + rule.name;
      for (auto& hf : rule.hf) hf = family.hf_prefix + "layers." + std::to_string(layer) + "." + hf;
      if (rule.experts.total > 0) {
        const auto [first, count] = local_experts(rule.experts.total, place.ep_rank, place.ep_size);
        rule.experts.first = first;
        rule.experts.count = count;
      }
      rules.push_back(std::move(rule));
    }
  }
  if (!place.post_process) return rules;
  rules.push_back({.name = "decoder.final_layernorm.weight",
                   .hf = {family.hf_prefix + "norm.weight"},
                   .rows = config.hidden_size,
                   .init = norm_init(config)});
  if (config.untie_embeddings_and_output_weights) {
    rules.push_back(vocabulary("output_layer.weight", "lm_head.weight"));
  } else if (!place.pre_process) {
    auto tied = vocabulary("output_layer.weight", embedding_name);
    tied.copy = true;
    rules.push_back(std::move(tied));
  }
  return rules;
}

}  // namespace mcore_bridge
