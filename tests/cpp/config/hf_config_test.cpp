// config.json as model authors write it: sparse, in two spellings, sometimes wrong.
#include <gtest/gtest.h>

#include <map>

#include "mcore_bridge/error.h"
#include "mcore_bridge/model_config.h"

namespace mcore_bridge {
namespace {

Json sparse(const std::string& type, const Json& more = Json::object()) {
  Json hf = {{"model_type", type},     {"hidden_size", 2048},       {"intermediate_size", 96},
             {"num_hidden_layers", 4}, {"num_attention_heads", 32}, {"vocab_size", 101}};
  hf.update(more);
  return hf;
}

ModelConfig read(const std::string& type, const Json& more = Json::object()) {
  auto config = ModelConfig::from_json(ModelConfig::from_hf(sparse(type, more)));
  config.finalize();
  return config;
}

std::string error_of(const std::string& type, const Json& more) {
  try {
    read(type, more);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

#define EXPECT_IN(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << text

}  // namespace

TEST(HfConfig, SilenceMeansWhatTransformersAssumes) {
  for (const char* type : {"llama", "qwen2", "qwen3", "mistral"}) EXPECT_EQ(read(type).layernorm_epsilon, 1e-6) << type;
  EXPECT_EQ(read("llama").max_position_embeddings, 2048);
  EXPECT_EQ(read("llama").query_groups(), 32);
  EXPECT_EQ(read("llama").head_dim(), 64);
  EXPECT_EQ(read("qwen3").head_dim(), 128);
  EXPECT_EQ(read("mistral").query_groups(), 8);
  EXPECT_EQ(read("mistral").window_size, (IntList{4095, 0}));
  EXPECT_TRUE(read("mistral", {{"sliding_window", nullptr}}).window_size.empty()) << "null is none, not the default";
  const auto windowed = read("qwen2", {{"use_sliding_window", true}, {"num_hidden_layers", 30}});
  EXPECT_FALSE(windowed.has_window(27));
  EXPECT_TRUE(windowed.has_window(28));
}

TEST(HfConfig, BiasesFollowEachModel) {
  const Json flags = {{"attention_bias", true}, {"mlp_bias", true}};
  auto biases = [&](const char* type) {
    const auto c = read(type, flags);
    return IntList{c.add_qkv_bias, c.add_attention_proj_bias, c.add_mlp_bias};
  };
  EXPECT_EQ(biases("llama"), (IntList{1, 1, 1}));
  EXPECT_EQ(biases("qwen2"), (IntList{1, 0, 0}));
  EXPECT_EQ(biases("qwen3"), (IntList{1, 1, 0}));
  EXPECT_EQ(biases("mistral"), (IntList{0, 0, 0}));
}

TEST(HfConfig, LayerTypes) {
  const Json types = {"full_attention", "sliding_attention", "full_attention", "sliding_attention"};
  const Json on = {{"use_sliding_window", true}, {"sliding_window", 5}, {"layer_types", types}};
  const auto qwen = read("qwen3", on);
  EXPECT_FALSE(qwen.has_window(0) || qwen.has_window(2));
  EXPECT_TRUE(qwen.has_window(1) && qwen.has_window(3));
  EXPECT_TRUE(read("mistral", on).has_window(0)) << "Mistral has the window everywhere";
  EXPECT_TRUE(read("qwen2", {{"use_sliding_window", true}, {"max_window_layers", 4}}).window_size.empty());
  EXPECT_IN(error_of("qwen2", {{"layer_types", types}}), "use_sliding_window");
  EXPECT_IN(error_of("qwen2", {{"layer_types", {"full_attention"}}}), "4 layers");
  EXPECT_IN(error_of("qwen2", {{"layer_types", {"chunked_attention", "full_attention", "full_attention", "x"}}}),
            "chunked_attention");
}

TEST(HfConfig, RopeDictionaries) {
  const auto config =
      read("llama", {{"rope_parameters",
                      {{"rope_type", "linear"}, {"factor", 2}, {"rope_theta", 1e6}, {"partial_rotary_factor", 0.5}}}});
  EXPECT_EQ(config.rotary_base, 1e6);
  EXPECT_EQ(config.rotary_percent, 0.5);
  EXPECT_EQ(config.rope_scaling, (Json{{"rope_type", "linear"}, {"factor", 2}}));
  EXPECT_TRUE(read("llama", {{"rope_scaling", Json::object()}}).rope_scaling.is_null());

  const Json newer = {{"rope_type", "yarn"}, {"factor", 4.0}, {"rope_theta", 1e6}};
  const auto both = read("llama", {{"rope_parameters", newer}, {"rope_scaling", {{"type", "yarn"}, {"factor", 4}}}});
  EXPECT_EQ(both.rope_scaling["factor"], 4);
  EXPECT_EQ(both.rotary_base, 1e6);
  EXPECT_IN(error_of("llama", {{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}}},
                               {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4}}}}),
            "keep one dictionary");
  EXPECT_IN(error_of("llama", {{"rope_parameters", {{"full_attention", {{"rope_type", "yarn"}}}}}}), "full_attention");
}

TEST(HfConfig, NestedTextConfigOverridesTheOuterOne) {
  Json hf = {{"model_type", "llama"}, {"vocab_size", 7}, {"text_config", sparse("llama", {{"vocab_size", 11}})}};
  const auto fields = ModelConfig::from_hf(hf);
  EXPECT_EQ(fields["padded_vocab_size"], 11);
  EXPECT_EQ(fields["hf_model_type"], "llama");
  EXPECT_EQ(fields["llm_model_type"], "llama");
  EXPECT_EQ(fields["layernorm_epsilon"], 1e-6) << "defaults belong to the text part";
}

TEST(HfConfig, WrongTypesAreValueErrorsThatNameTheKey) {
  const std::vector<std::pair<const char*, Json>> cases = {{"use_sliding_window", "yes"},
                                                           {"attention_bias", 1},
                                                           {"num_hidden_layers", "six"},
                                                           {"rope_scaling", 7},
                                                           {"tie_word_embeddings", "x"},
                                                           {"hidden_act", 3},
                                                           {"layer_types", "full"},
                                                           {"rms_norm_eps", "tiny"},
                                                           {"rope_parameters", {{"rope_type", 4}}},
                                                           {"quantization_config", {{"quant_method", "awq"}}}};
  for (const auto& [key, value] : cases) {
    try {
      read("qwen3", {{key, value}});
      ADD_FAILURE() << key << " was accepted";
    } catch (const ValueError& error) {
      // Fields of the common table are reported under the engine's name, a quantised file by its format.
      static const std::map<std::string, std::string> names = {{"rms_norm_eps", "layernorm_epsilon"},
                                                               {"quantization_config", "awq"}};
      const auto other = names.find(key);
      const std::string text = error.what(), name = other == names.end() ? key : other->second;
      EXPECT_IN(text, name);
    }
  }
  EXPECT_THROW(ModelConfig::from_hf({{"hidden_size", 3}}), KeyError);
  EXPECT_THROW(ModelConfig::from_hf({{"model_type", 3}}), ValueError);
  EXPECT_THROW(ModelConfig::from_hf(Json::array()), ValueError);
}

}  // namespace mcore_bridge
