#include "mcore_bridge/model_config.h"

#include <gtest/gtest.h>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

Json llama() {
  return Json::parse(R"({"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 100, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
    "tie_word_embeddings": true, "hidden_act": "silu", "max_position_embeddings": 64})");
}

ModelConfig make(Json hf, const Json& overrides = Json::object()) {
  auto fields = ModelConfig::from_hf(hf);
  fields.update(overrides);
  auto config = ModelConfig::from_json(fields);
  config.finalize();
  return config;
}

/// The text of the error that `overrides` cause.
std::string error_of(const Json& overrides, Json hf = llama()) {
  try {
    make(std::move(hf), overrides);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

#define EXPECT_IN(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << text

}  // namespace

TEST(ModelConfig, FromHuggingFace) {
  const auto config = make(llama());
  EXPECT_EQ(config.num_layers, 6);
  EXPECT_EQ(config.query_groups(), 4);
  EXPECT_EQ(config.head_dim(), 8);
  EXPECT_EQ(config.rotary_base, 5e5);
  EXPECT_FALSE(config.untie_embeddings_and_output_weights);
  EXPECT_EQ(config.mcore_model_type, "llama");
  EXPECT_FALSE(config.add_qkv_bias || config.add_attention_proj_bias || config.add_mlp_bias);
}

TEST(ModelConfig, BothSpellingsOfRope) {
  auto older = llama(), newer = llama();
  older["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  newer.erase("rope_theta");
  newer["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 5e5}};
  EXPECT_EQ(make(older).rotary_base, make(newer).rotary_base);
  EXPECT_EQ(make(older).rope_scaling["rope_type"], make(newer).rope_scaling["rope_type"]);
  newer["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5e5}};
  EXPECT_TRUE(make(newer).rope_scaling.is_null());
}

TEST(ModelConfig, BiasesOfLlama) {
  auto hf = llama();
  hf["attention_bias"] = true;
  hf["mlp_bias"] = true;
  const auto config = make(hf);
  EXPECT_TRUE(config.add_qkv_bias && config.add_attention_proj_bias && config.add_mlp_bias);
}

TEST(ModelConfig, SlidingWindows) {
  auto hf = llama();
  hf["model_type"] = "mistral";
  hf["sliding_window"] = 5;
  const auto mistral = make(hf);
  EXPECT_EQ(mistral.window_size, (IntList{4, 0}));
  EXPECT_TRUE(mistral.has_window(0) && mistral.has_window(5));
  hf["model_type"] = "qwen2";
  EXPECT_FALSE(make(hf).has_window(0)) << "use_sliding_window is off";
  hf["use_sliding_window"] = true;
  hf["max_window_layers"] = 2;
  const auto qwen2 = make(hf);
  EXPECT_TRUE(qwen2.add_qkv_bias && !qwen2.add_attention_proj_bias);
  EXPECT_FALSE(qwen2.has_window(1));
  EXPECT_TRUE(qwen2.has_window(2));
}

TEST(ModelConfig, EveryFieldRoundTrips) {
  const auto config = make(llama(), {{"window_size", "3,0"},
                                     {"no_rope_freq", "[0]*3+[1]*3"},
                                     {"params_dtype", "torch.bfloat16"},
                                     {"rope_scaling", R"({"type": "linear", "factor": 4})"}});
  const auto values = config.to_json();
  EXPECT_EQ(values.size(), config_fields().size());
  auto again = ModelConfig::from_json(values);
  again.finalize();
  EXPECT_EQ(again.to_json(), values);
  EXPECT_EQ(config.window_size, (IntList{3, 0}));
  EXPECT_TRUE(config.has_rope(2) && !config.has_rope(3));
  EXPECT_EQ(config.params_dtype, at::kBFloat16);
  EXPECT_TRUE(config.bf16);
}

TEST(ModelConfig, Patterns) {
  auto flags = [](const Json& value) { return ModelConfig::from_json({{"no_rope_freq", value}}).no_rope_freq; };
  EXPECT_EQ(flags("[0]*2+[1,0]*2").expand(6, 1, "f"), (IntList{0, 0, 1, 0, 1, 0}));
  EXPECT_EQ(flags("([0]+[1])*3").expand(6, 1, "f"), (IntList{0, 1, 0, 1, 0, 1}));
  EXPECT_EQ(flags(3).expand(6, 1, "f"), (IntList{0, 0, 1, 0, 0, 1}));
  EXPECT_EQ(flags("2").expand(4, 0, "f"), (IntList{1, 0, 1, 0}));
  for (const char* bad :
       {"__import__('os')", "[0]*", "[0", "0]*3", "[0]**3", "[0]*99999999", "[1]*9999*9999", "", "3+4"}) {
    EXPECT_THROW(flags(bad).expand(6, 1, "f"), ValueError) << bad;
  }
  EXPECT_THROW(flags("[0]*5").expand(6, 1, "f"), ValueError);
}

TEST(ModelConfig, ErrorsNameWhatIsWrong) {
  EXPECT_IN(error_of({{"hiden_size", 3}}), "hidden_size");
  EXPECT_IN(error_of({{"num_layers", "six"}}), "num_layers");
  EXPECT_IN(error_of({{"num_layers", 6.5}}), "num_layers");
  EXPECT_IN(error_of({{"attention_dropout", 1.0}}), "attention_dropout");
  EXPECT_IN(error_of({{"tensor_model_parallel_size", 3}}), "use one of 1, 2, 4, 8");
  EXPECT_IN(error_of({{"num_query_groups", 3}}), "num_query_groups");
  EXPECT_IN(error_of({{"pipeline_model_parallel_size", 4}}), "num_layers_in_first_pipeline_stage");
  EXPECT_IN(error_of({{"fp8_param", true}}), "set fp8 (--fp8_format) too");
  EXPECT_IN(error_of({{"window_attn_skip_freq", 2}}), "window_size");
  EXPECT_IN(error_of({{"rope_scaling", {{"rope_type", "spiral"}}}}), "spiral");
  EXPECT_IN(error_of({{"rope_scaling", {{"rope_type", "linear"}}}}), "factor");
  EXPECT_IN(error_of({{"params_dtype", "int8"}}), "float32");
  EXPECT_EQ(error_of({{"apply_rope_fusion", true}, {"fp8", nullptr}, {"attention_backend", "flash"}}), "no error");

  auto hf = llama();
  hf["hidden_act"] = "relu2";
  EXPECT_IN(error_of({}, hf), "relu2");
  hf = llama();
  hf.erase("num_hidden_layers");
  EXPECT_IN(error_of({}, hf), "num_hidden_layers");
  hf = llama();
  hf["quantization_config"] = {{"quant_method", "gptq"}};
  EXPECT_IN(error_of({}, hf), "gptq");
  hf = llama();
  hf["model_type"] = "marsupial";
  EXPECT_IN(error_of({}, hf), "qwen3");
}

TEST(ModelConfig, LayersOfStages) {
  auto counts = [](const Json& overrides, int stages) {
    auto changed = overrides;
    changed["pipeline_model_parallel_size"] = stages;
    const auto config = make(llama(), changed);
    std::vector<int64_t> result;
    int64_t next = 0;
    for (int stage = 0; stage < stages; ++stage) {
      const auto range = config.layers_of(stage, 0);
      EXPECT_EQ(range.first, next);
      next += range.count;
      result.push_back(range.count);
    }
    EXPECT_EQ(next, config.num_layers);
    return result;
  };
  using Counts = std::vector<int64_t>;
  EXPECT_EQ(counts({}, 3), (Counts{2, 2, 2}));
  EXPECT_EQ(counts({{"num_layers_in_first_pipeline_stage", 1}, {"num_layers_in_last_pipeline_stage", 2}}, 3),
            (Counts{1, 3, 2}));
  EXPECT_EQ(counts({{"num_layers_in_first_pipeline_stage", 3}}, 4), (Counts{3, 1, 1, 1}));
  EXPECT_EQ(
      counts({{"account_for_embedding_in_pipeline_split", true}, {"account_for_loss_in_pipeline_split", true}}, 4),
      (Counts{1, 2, 2, 1}));
}

}  // namespace mcore_bridge
