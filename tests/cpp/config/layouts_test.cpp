#include "mcore_bridge/layouts.h"

#include <gtest/gtest.h>

#include "mcore_bridge/error.h"
#include "mcore_bridge/model.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {
namespace {

ModelConfig make(const Json& changes = Json::object()) {
  Json fields = {{"num_layers", 12},          {"hidden_size", 96},     {"ffn_hidden_size", 192},
                 {"num_attention_heads", 12}, {"num_query_groups", 4}, {"padded_vocab_size", 7},
                 {"hf_model_type", "llama"}};
  fields.update(changes);
  return ModelConfig::from_json(fields);
}

std::string error_of(const ModelConfig& config, const RunSizes& run = {}) {
  try {
    check_layout(config, run);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

#define EXPECT_IN(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << text

/// Every rank of the layout builds, on the meta device.
void expect_builds(const ModelConfig& config, const Layout& layout) {
  auto split = with_layout(config, layout);
  split.finalize();
  const auto ranks = layout.run.processes > 0 ? layout.run.processes : layout.model_ranks();
  const Topology topology(split.parallel_sizes(), static_cast<int>(ranks));
  int64_t layers = 0;
  for (int rank = 0; rank < topology.world_size(); ++rank) {
    const auto parallel = ParallelState::planned(topology, rank);
    for (int vp_stage = 0; vp_stage < split.virtual_stages(); ++vp_stage) {
      build_model(split, parallel, vp_stage, "meta");
      if (parallel->place.tp == 0 && parallel->place.cp == 0 && parallel->place.dp == 0)
        layers += split.layers_of(parallel->place.pp, vp_stage).count;
    }
  }
  EXPECT_EQ(layers, config.num_layers);
}

struct Refusal {
  Json fields;
  RunSizes run;
  std::string says, nearest;
};

}  // namespace

TEST(Layouts, RefusalsNameTheNearestThatBuilds) {
  const std::vector<Refusal> refusals = {
      // heads, key/value groups, width
      {{{"tensor_model_parallel_size", 5}}, {}, "num_attention_heads 12", "tensor_model_parallel_size 4"},
      {{{"tensor_model_parallel_size", 6}}, {}, "num_query_groups 4", "tensor_model_parallel_size 4"},
      {{{"ffn_hidden_size", 95}, {"tensor_model_parallel_size", 2}},
       {},
       "ffn_hidden_size 95",
       "tensor_model_parallel_size 1"},
      // layers
      {{{"pipeline_model_parallel_size", 5}}, {}, "num_layers 12", "pipeline_model_parallel_size 6"},
      {{{"pipeline_model_parallel_size", 24}}, {}, "num_layers 12", "pipeline_model_parallel_size 12"},
      // processes
      {{{"tensor_model_parallel_size", 4}}, {.processes = 6}, "6 processes", "tensor_model_parallel_size 2"},
      {{{"pipeline_model_parallel_size", 3}}, {.processes = 8}, "8 processes", "pipeline_model_parallel_size 4"},
      {{{"tensor_model_parallel_size", 4}, {"pipeline_model_parallel_size", 4}},
       {.processes = 8},
       "= 16 does not divide the 8 processes",
       "tensor_model_parallel_size 2"},
      // batch
      {{{"tensor_model_parallel_size", 2}},
       {.processes = 8, .micro_batch_size = 2, .global_batch_size = 20},
       "global_batch_size 20 is no multiple of micro_batch_size 2 x 4",
       "global_batch_size 24"},
      // sequence
      {{{"tensor_model_parallel_size", 2}, {"sequence_parallel", true}},
       {.sequence_length = 1001},
       "sequence length 1001",
       "sequence length 1002"},
  };
  for (const auto& refusal : refusals) {
    const auto config = make(refusal.fields);
    const auto text = error_of(config, refusal.run);
    EXPECT_IN(text, refusal.says);
    EXPECT_IN(text, "the nearest layout that works: " + refusal.nearest);
    const auto nearest = nearest_layouts(config, refusal.run);
    ASSERT_EQ(nearest.size(), 1u);
    EXPECT_EQ(layout_changes(nearest[0], layout_of(config, refusal.run)).rfind(refusal.nearest, 0), 0u) << text;
    EXPECT_EQ(error_of(with_layout(config, nearest[0]), nearest[0].run), "no error");
    expect_builds(config, nearest[0]);
  }
}

TEST(Layouts, FinalizeNamesTheNearestToo) {
  auto config = make({{"tensor_model_parallel_size", 5}, {"pipeline_model_parallel_size", 2}});
  try {
    config.finalize();
    FAIL();
  } catch (const ValueError& error) {
    EXPECT_IN(error.what(), "the nearest layout that works: tensor_model_parallel_size 4");
  }
}

TEST(Layouts, WhatWorksPasses) {
  EXPECT_EQ(error_of(make()), "no error");
  EXPECT_EQ(error_of(make({{"tensor_model_parallel_size", 4}, {"pipeline_model_parallel_size", 2}}),
                     {.processes = 16, .micro_batch_size = 1, .global_batch_size = 8, .sequence_length = 33}),
            "no error");
}

TEST(Layouts, PossibleOnesBuildAndAreComplete) {
  const auto config = make();
  const RunSizes run{.processes = 8};
  const auto layouts = possible_layouts(config, run);
  for (const auto& layout : layouts) expect_builds(config, layout);
  // Every combination that the rules accept is there.
  int64_t expected = 0;
  for (const int64_t tensor : {1, 2, 4, 8}) {
    for (const int64_t pipeline : {1, 2, 4, 8}) {
      for (const bool account : {false, true}) {
        if (account && pipeline == 1) continue;
        const Layout layout{.tensor = tensor, .pipeline = pipeline, .account = account, .run = run};
        expected += error_of(with_layout(config, layout), run) == "no error" ? 1 : 0;
      }
    }
  }
  int64_t found = 0;
  for (const auto& layout : layouts) found += layout.context == 1 && layout.virtual_pipeline == 1 ? 1 : 0;
  EXPECT_EQ(found, expected);
}

TEST(Layouts, LayersThatDoNotDivideMayCountTheEnds) {
  // 14 = 12 layers, embedding and loss: 7 stages.
  const auto nearest = nearest_layouts(make({{"pipeline_model_parallel_size", 7}}), {.processes = 7});
  ASSERT_FALSE(nearest.empty());
  EXPECT_EQ(nearest[0].pipeline, 7);
  EXPECT_TRUE(nearest[0].account);
  expect_builds(make(), nearest[0]);
}

}  // namespace mcore_bridge
