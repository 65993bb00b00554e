#include <gtest/gtest.h>

#include <map>

#include "families/family.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

ModelConfig make(const std::string& type, const Json& more = Json::object(), const Json& fields = Json::object()) {
  Json hf = {{"model_type", type},       {"hidden_size", 24}, {"intermediate_size", 40},  {"num_hidden_layers", 4},
             {"num_attention_heads", 6}, {"head_dim", 8},     {"num_key_value_heads", 2}, {"vocab_size", 29}};
  hf.update(more);
  auto values = ModelConfig::from_hf(hf);
  values.update(fields);
  auto config = ModelConfig::from_json(values);
  config.finalize();
  return config;
}

std::map<std::string, WeightRule> rules_of(const ModelConfig& config, ChunkPlace place = {.layers = {0, 4}}) {
  std::map<std::string, WeightRule> result;
  for (const auto& rule : chunk_weights(config, place)) {
    EXPECT_TRUE(result.emplace(rule.name, rule).second) << rule.name << " twice";
  }
  return result;
}

}  // namespace

TEST(Families, TableIsConsistent) {
  for (const auto& family : families()) {
    EXPECT_FALSE(family.documentation.empty()) << family.name;
    for (const auto& type : family.model_types) EXPECT_EQ(find_family(type), &family) << type;
    ModelConfig config;
    config.mcore_model_type = family.name;
    EXPECT_EQ(&family_of(config), &family);
  }
  EXPECT_EQ(find_family("marsupial"), nullptr);
}

TEST(Families, AMistypedFamilyIsNotReplacedByTheModelType) {
  ModelConfig config;
  config.hf_model_type = "llama";
  EXPECT_EQ(family_of(config).name, "llama");
  config.mcore_model_type = "gpt";
  EXPECT_EQ(family_of(config).name, "llama") << "the original's name for ordinary models";
  config.mcore_model_type = "lama";
  EXPECT_THROW(family_of(config), ValueError);
}

TEST(Families, ShapesAndSplits) {
  const auto rules = rules_of(make("qwen3"));
  const auto& qkv = rules.at("decoder.layers.3.self_attention.linear_qkv.weight");
  EXPECT_EQ(qkv.rows, (6 + 2 + 2) * 8);
  EXPECT_EQ(qkv.cols, 24);
  EXPECT_EQ(qkv.shard, Shard::kColumn);
  EXPECT_EQ(qkv.fuse, Fuse::kQkv);
  EXPECT_EQ(qkv.hf, (std::vector<std::string>{"model.layers.3.self_attn.q_proj.weight",
                                              "model.layers.3.self_attn.k_proj.weight",
                                              "model.layers.3.self_attn.v_proj.weight"}));
  const auto& proj = rules.at("decoder.layers.0.self_attention.linear_proj.weight");
  EXPECT_EQ(proj.cols, 48) << "heads * head_dim, not hidden_size";
  EXPECT_EQ(proj.shard, Shard::kRow);
  EXPECT_EQ(rules.at("decoder.layers.0.self_attention.q_layernorm.weight").rows, 8);
  const auto& fc1 = rules.at("decoder.layers.0.mlp.linear_fc1.weight");
  EXPECT_EQ(fc1.rows, 80);
  EXPECT_EQ(fc1.fuse, Fuse::kGateUp);
  const auto& embedding = rules.at("embedding.word_embeddings.weight");
  EXPECT_EQ(embedding.rows, 29);
  EXPECT_TRUE(embedding.pad_rows);
  EXPECT_EQ(rules.at("decoder.final_layernorm.weight").hf[0], "model.norm.weight");
  EXPECT_EQ(rules_of(make("llama")).count("decoder.layers.0.self_attention.q_layernorm.weight"), 0u);
}

TEST(Families, Biases) {
  const auto rules = rules_of(make("llama", {{"attention_bias", true}, {"mlp_bias", true}}));
  const auto& qkv = rules.at("decoder.layers.0.self_attention.linear_qkv.bias");
  EXPECT_EQ(qkv.cols, 0);
  EXPECT_EQ(qkv.fuse, Fuse::kQkv);
  EXPECT_EQ(qkv.hf[2], "model.layers.0.self_attn.v_proj.bias");
  EXPECT_EQ(rules.at("decoder.layers.0.mlp.linear_fc1.bias").fuse, Fuse::kGateUp);
  for (const char* name : {"self_attention.linear_proj.bias", "mlp.linear_fc2.bias"}) {
    const auto& bias = rules.at(std::string("decoder.layers.0.") + name);
    EXPECT_EQ(bias.shard, Shard::kReplicated) << name << " is added once, after the sum over ranks";
    EXPECT_EQ(bias.rows, 24);
    EXPECT_EQ(bias.init, WeightRule::Init::kZero);
  }
  const auto qwen2 = rules_of(make("qwen2"));
  EXPECT_EQ(qwen2.count("decoder.layers.0.self_attention.linear_qkv.bias"), 1u);
  EXPECT_EQ(qwen2.count("decoder.layers.0.self_attention.linear_proj.bias"), 0u);
}

TEST(Families, Initialisation) {
  using Init = WeightRule::Init;
  const auto rules = rules_of(make("qwen3"));
  EXPECT_EQ(rules.at("decoder.layers.0.mlp.linear_fc1.weight").init, Init::kNormal);
  EXPECT_EQ(rules.at("decoder.layers.0.mlp.linear_fc2.weight").init, Init::kScaledNormal);
  EXPECT_EQ(rules.at("decoder.layers.0.self_attention.linear_proj.weight").init, Init::kScaledNormal);
  const auto centred = rules_of(make("qwen3", Json::object(), {{"layernorm_zero_centered_gamma", true}}));
  for (const char* name : {"decoder.final_layernorm.weight", "decoder.layers.1.self_attention.k_layernorm.weight",
                           "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"}) {
    EXPECT_EQ(rules.at(name).init, Init::kOne) << name;
    EXPECT_EQ(centred.at(name).init, Init::kZero) << name;
  }
}

TEST(Families, StagesHoldTheirParts) {
  const ChunkPlace first{{0, 2}, true, false}, last{{2, 2}, false, true};
  for (const bool tied : {false, true}) {
    const auto config = make("llama", {{"tie_word_embeddings", tied}});
    const auto head = rules_of(config, first), tail = rules_of(config, last), whole = rules_of(config);
    EXPECT_EQ(head.count("embedding.word_embeddings.weight"), 1u);
    EXPECT_EQ(head.count("decoder.final_layernorm.weight") + head.count("output_layer.weight"), 0u);
    EXPECT_EQ(tail.count("embedding.word_embeddings.weight"), 0u);
    // Local index in the name, global index in the file.
    EXPECT_EQ(tail.at("decoder.layers.0.mlp.linear_fc2.weight").hf[0], "model.layers.2.mlp.down_proj.weight");
    const auto& output = tail.at("output_layer.weight");
    EXPECT_EQ(output.copy, tied);
    EXPECT_EQ(output.hf[0], tied ? "model.embed_tokens.weight" : "lm_head.weight");
    EXPECT_EQ(whole.count("output_layer.weight"), tied ? 0u : 1u);
  }
}

}  // namespace mcore_bridge
