#include <gtest/gtest.h>

#include "mcore_bridge/error.h"
#include "mcore_bridge/model_config.h"

namespace mcore_bridge {
namespace {

ModelConfig make(const Json& changes) {
  Json fields = {{"num_layers", 12},          {"hidden_size", 96},     {"ffn_hidden_size", 96},
                 {"num_attention_heads", 12}, {"num_query_groups", 4}, {"padded_vocab_size", 7},
                 {"hf_model_type", "llama"}};
  fields.update(changes);
  auto config = ModelConfig::from_json(fields);
  config.finalize();
  return config;
}

std::string error_of(const Json& changes) {
  try {
    make(changes);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

#define EXPECT_IN(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << text

/// The numbers after "use one of" in an error.
IntList offered(const std::string& text) {
  const auto start = text.find("use one of ");
  IntList result;
  if (start == std::string::npos) return result;
  std::istringstream words(text.substr(start + 11));
  for (int64_t n; words >> n; words.ignore(2)) {
    result.push_back(n);
    if (words.peek() != ',') break;
  }
  return result;
}

/// A value that is not the field's default, by its type.
Json another_value(const std::string& name, const std::string& type, const Json& now) {
  if (type == "bool") return !now.get<bool>();
  if (type == "int" || type == "int?") return 3;
  if (type == "float" || type == "float?") return 0.25;
  if (type == "str" || type == "str?") return "word";
  if (type == "list[int]") return Json::array({5, 0});
  if (type == "list[float]") return Json::array({0.5, 0.25});
  if (type == "list[str]") return Json::array({"mlp", "core_attn"});
  if (type == "pattern") return Json::array({1, 0, 1});
  if (type == "dict?") return Json{{"rope_type", "linear"}, {"factor", 2}};
  if (type == "layout") return "Et|ttL";
  if (type == "dtype") return "bfloat16";
  ADD_FAILURE() << name << " has the unknown type " << type;
  return nullptr;
}

}  // namespace

TEST(Validate, EveryFieldIsReadAndWritten) {
  for (const auto& field : config_fields()) {
    const auto name = field["name"].get<std::string>();
    const auto value = another_value(name, field["type"], field["default"]);
    EXPECT_NE(value, field["default"]) << name;
    const auto written = ModelConfig::from_json({{name, value}}).to_json();
    EXPECT_EQ(written[name], value) << name;
    EXPECT_EQ(ModelConfig::from_json(written).to_json(), written) << name;
    EXPECT_EQ(ModelConfig::from_json({{name, nullptr}}).to_json()[name], field["default"]) << name << ": null";
    EXPECT_FALSE(field["doc"].get<std::string>().empty()) << name;
  }
}

TEST(Validate, OfferedSizesWork) {
  // 3, 6 and 12 divide heads and width, but 3 and 6 share nothing with 4 key/value heads.
  for (const int bad : {3, 5, 6, 24}) {
    const auto sizes = offered(error_of({{"tensor_model_parallel_size", bad}}));
    EXPECT_EQ(sizes, (IntList{1, 2, 4, 12})) << bad;
    for (const auto size : sizes) EXPECT_EQ(error_of({{"tensor_model_parallel_size", size}}), "no error");
  }
  for (const bool accounts : {false, true}) {
    Json changes = {{"account_for_embedding_in_pipeline_split", accounts},
                    {"account_for_loss_in_pipeline_split", accounts},
                    {"pipeline_model_parallel_size", 5}};
    const auto sizes = offered(error_of(changes));
    EXPECT_EQ(sizes, accounts ? (IntList{1, 2, 7, 14}) : (IntList{1, 2, 3, 4, 6, 12}));
    for (const auto size : sizes) {
      changes["pipeline_model_parallel_size"] = size;
      EXPECT_EQ(error_of(changes), "no error") << size;
    }
  }
}

TEST(Validate, Contradictions) {
  EXPECT_IN(error_of({{"fp16", true}, {"bf16", true}}), "exclude");
  EXPECT_IN(error_of({{"bf16", true}, {"params_dtype", "float16"}}), "params_dtype");
  EXPECT_IN(error_of({{"fp16", true}, {"params_dtype", "bfloat16"}}), "params_dtype");
  EXPECT_IN(error_of({{"rope_scaling", {{"rope_type", "default"}, {"rope_theta", 1e6}}}}), "rotary_base");
  EXPECT_EQ(error_of({{"rope_scaling", {{"rope_type", "default"}, {"rope_theta", 1e4}}}}), "no error");
  EXPECT_IN(error_of({{"num_layers_in_first_pipeline_stage", 2},
                      {"account_for_loss_in_pipeline_split", true},
                      {"pipeline_model_parallel_size", 2}}),
            "exclude each other");
  EXPECT_IN(error_of({{"num_layers_in_first_pipeline_stage", 2}}), "pipeline_model_parallel_size above 1");
  EXPECT_IN(error_of({{"num_layers_in_first_pipeline_stage", 12}, {"pipeline_model_parallel_size", 2}}), "spread");
  EXPECT_IN(error_of({{"num_layers_in_last_pipeline_stage", -1}, {"pipeline_model_parallel_size", 2}}), "fit");
}

TEST(Validate, Ranges) {
  EXPECT_IN(error_of({{"max_position_embeddings", 0}}), "max_position_embeddings");
  EXPECT_IN(error_of({{"hidden_dropout", -0.1}}), "hidden_dropout");
  EXPECT_IN(error_of({{"rotary_percent", 1.5}}), "rotary_percent");
  EXPECT_IN(error_of({{"window_size", {1, 2, 3}}}), "window_size");
  EXPECT_IN(error_of({{"window_size", {4, 4}}}), "causal");
  EXPECT_IN(error_of({{"tensor_model_parallel_size", 0}}), "at least 1");
  EXPECT_IN(error_of({{"pipeline_model_parallel_size", -2}}), "at least 1");
}

TEST(Validate, FeaturesOfLaterVersions) {
  for (const Json& change : std::vector<Json>{{{"multi_latent_attention", true}},
                                              {{"mtp_num_layers", 1}},
                                              {{"softmax_type", "off-by-one"}},
                                              {{"normalization", "LayerNorm"}},
                                              {{"swiglu", false}}}) {
    EXPECT_IN(error_of(change), "not supported by this version");
  }
  EXPECT_IN(error_of({{"expert_model_parallel_size", 2}}), "mixture-of-experts");
  EXPECT_IN(error_of({{"expert_tensor_parallel_size", 7}}), "mixture-of-experts");
  EXPECT_EQ(error_of({{"expert_tensor_parallel_size", 1}, {"tensor_model_parallel_size", 2}}), "no error");
}

TEST(Validate, MixtureOfExperts) {
  auto moe = [](Json change) {
    Json values = {{"num_moe_experts", 8}, {"moe_ffn_hidden_size", 24}};
    if (!change.is_null()) values.update(change);
    return error_of(values);
  };
  EXPECT_EQ(moe({}), "no error");
  EXPECT_IN(moe({{"moe_router_topk", 9}}), "1..8");
  EXPECT_IN(moe({{"moe_router_num_groups", 3}}), "does not divide num_moe_experts 8");
  EXPECT_IN(moe({{"moe_router_num_groups", 4}, {"moe_router_group_topk", 1}, {"moe_router_topk", 3}}),
            "more than the 2");
  EXPECT_IN(moe({{"moe_router_score_function", "tanh"}}), "softmax, sigmoid");
  EXPECT_IN(moe({{"moe_router_dtype", "bf16"}}), "none, fp32, fp64");
  EXPECT_IN(moe({{"moe_router_load_balancing_type", {"aux_loss", "sinkhorn"}}}), "stands alone");
  EXPECT_IN(moe({{"moe_router_load_balancing_type", "none"}, {"moe_aux_loss_coeff", 0.1}}), "no effect");
  EXPECT_IN(moe({{"moe_aux_loss_coeff", {0.1, 0.2}}}), "one for each");
  EXPECT_EQ(moe({{"moe_router_load_balancing_type", {"aux_loss", "seq_aux_loss"}}, {"moe_aux_loss_coeff", {0.1, 0.2}}}),
            "no error");
  EXPECT_IN(moe({{"moe_token_dispatcher_type", "flex"}}), "use alltoall");
  EXPECT_IN(moe({{"moe_pad_expert_input_to_capacity", true}}), "moe_expert_capacity_factor");
  EXPECT_IN(moe({{"moe_expert_capacity_factor", -1}}), "must be positive");
  EXPECT_IN(moe({{"moe_layer_freq", {1, 0}}}), "moe_layer_freq");
  EXPECT_IN(moe({{"moe_shared_expert_gate", true}}), "no shared expert");
  EXPECT_IN(moe({{"expert_model_parallel_size", 3}}), "does not divide num_moe_experts 8");
  EXPECT_IN(moe({{"tensor_model_parallel_size", 2}}), "sequence_parallel");
  const Json split = {{"tensor_model_parallel_size", 2}, {"sequence_parallel", true}};
  EXPECT_EQ(moe(split), "no error");
  auto five = split;
  five["expert_tensor_parallel_size"] = 5;
  EXPECT_IN(moe(five), "does not divide moe_ffn_hidden_size 24");
  EXPECT_TRUE(make({{"num_moe_experts", 4}, {"moe_layer_freq", 2}}).is_moe_layer(2));
  EXPECT_FALSE(make({{"num_moe_experts", 4}, {"moe_layer_freq", 2}}).is_moe_layer(1));
}

TEST(Validate, ContextParallel) {
  for (const char* type : {"p2p", "all_gather", "a2a"})
    EXPECT_EQ(error_of({{"context_parallel_size", 4}, {"cp_comm_type", type}}), "no error");
  EXPECT_IN(error_of({{"cp_comm_type", "a2a+p2p"}}), "not supported by this version");
  EXPECT_IN(error_of({{"cp_comm_type", "ring"}}), "p2p, all_gather, a2a");
  // 12 query and 4 key/value heads, 2 of the latter on each of 2 tensor ranks.
  const auto text = error_of({{"context_parallel_size", 3}, {"cp_comm_type", "a2a"}});
  EXPECT_IN(text, "use 1, 2, 4, or");
  EXPECT_IN(error_of({{"context_parallel_size", 4}, {"cp_comm_type", "a2a"}, {"tensor_model_parallel_size", 2}}),
            "use 1, 2, or");
  EXPECT_EQ(error_of({{"context_parallel_size", 3}}), "no error");
  EXPECT_IN(error_of({{"context_parallel_size", 2}, {"attention_dropout", 0.1}}), "a2a");
  EXPECT_EQ(error_of({{"context_parallel_size", 2}, {"attention_dropout", 0.1}, {"cp_comm_type", "a2a"}}), "no error");
}

TEST(Validate, WhatIsKeptForBackward) {
  EXPECT_EQ(error_of({{"recompute_granularity", "selective"}}), "no error");
  EXPECT_TRUE(make({{"recompute_granularity", "selective"}}).recomputes("core_attn"));
  EXPECT_FALSE(make({{"recompute_granularity", "full"}}).recomputes("core_attn"));
  const auto config = make({{"recompute_granularity", "selective"}, {"recompute_modules", {"mlp", "layernorm"}}});
  EXPECT_TRUE(config.recomputes("mlp") && !config.recomputes("core_attn"));
  EXPECT_IN(error_of({{"recompute_modules", {"moe_act"}}}), "use moe");
  EXPECT_IN(error_of({{"recompute_modules", {"moe"}}}), "mixture-of-experts");
  EXPECT_IN(error_of({{"recompute_modules", {"mpl"}}}), "core_attn, mlp, moe, layernorm");
  EXPECT_IN(error_of({{"recompute_granularity", "half"}}), "full, selective, none");
  EXPECT_IN(error_of({{"cpu_offloading", true}}), "cpu_offloading_num_layers");
  EXPECT_IN(error_of({{"cpu_offloading", true}, {"cpu_offloading_num_layers", 1}, {"recompute_granularity", "full"}}),
            "use one of them");
  EXPECT_IN(error_of({{"tp_comm_overlap", true}, {"tensor_model_parallel_size", 2}}), "sequence_parallel");
  EXPECT_EQ(error_of({{"tp_comm_overlap", true}, {"tensor_model_parallel_size", 2}, {"sequence_parallel", true}}),
            "no error");
}

TEST(Validate, MegatronsDefaultsAreAccepted) {
  const Json defaults = {{"num_moe_experts", nullptr},
                         {"moe_layer_freq", "1"},
                         {"moe_router_topk", 2},
                         {"moe_router_score_function", "softmax"},
                         {"moe_router_load_balancing_type", "aux_loss"},
                         {"moe_aux_loss_coeff", 0.0},
                         {"multi_latent_attention", false},
                         {"q_lora_rank", nullptr},
                         {"kv_lora_rank", 32},
                         {"linear_decoupled_in_proj", false},
                         {"dsa_indexer_topk", nullptr},
                         {"mtp_num_layers", 0},
                         {"mtp_loss_scaling_factor", 0.1},
                         {"fp8", nullptr},
                         {"fp8_recipe", "delayed"},
                         {"cp_comm_type", "p2p"},
                         {"glu_linear_offset", 0.0},
                         {"recompute_granularity", nullptr},
                         {"attention_backend", "flash"}};
  EXPECT_EQ(error_of(defaults), "no error");
}

TEST(Validate, DerivedValues) {
  const auto config = make({{"add_bias_linear", true}, {"sequence_parallel", true}, {"bf16", true}});
  EXPECT_TRUE(config.add_qkv_bias && config.add_attention_proj_bias && config.add_mlp_bias);
  EXPECT_FALSE(config.sequence_parallel) << "one tensor rank has nothing to split";
  EXPECT_EQ(config.params_dtype, at::kBFloat16);
  EXPECT_EQ(config.kv_channels, 8);
  EXPECT_TRUE(make({{"sequence_parallel", true}, {"tensor_model_parallel_size", 2}}).sequence_parallel);
}

}  // namespace mcore_bridge
