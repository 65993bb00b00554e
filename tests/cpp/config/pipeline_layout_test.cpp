#include "config/pipeline_layout.h"

#include <gtest/gtest.h>

#include "mcore_bridge/error.h"

#define EXPECT_IN(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

namespace mcore_bridge {
namespace {

using Counts = std::vector<int64_t>;

ModelConfig make(int64_t layers, const Json& changes) {
  auto fields = ModelConfig::from_hf({{"model_type", "llama"},
                                      {"hidden_size", 32},
                                      {"intermediate_size", 64},
                                      {"num_hidden_layers", layers},
                                      {"num_attention_heads", 4},
                                      {"vocab_size", 100}});
  fields.update(changes);
  auto config = ModelConfig::from_json(fields);
  config.finalize();
  return config;
}

/// Layers by global chunk; checks that layers_of agrees and leaves none out.
Counts counts(int64_t layers, const Json& changes) {
  const auto config = make(layers, changes);
  const auto chunks = pipeline_layout(config);
  const int stages = static_cast<int>(config.pipeline_model_parallel_size);
  EXPECT_EQ(static_cast<int64_t>(chunks.size()), stages * config.virtual_stages());
  Counts result;
  int64_t next = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    const auto range = config.layers_of(static_cast<int>(i) % stages, static_cast<int>(i) / stages);
    EXPECT_EQ(range.first, next);
    EXPECT_EQ(range.count, chunks[i].layers.count);
    EXPECT_EQ(chunks[i].embedding, i == 0);
    EXPECT_EQ(chunks[i].loss, i + 1 == chunks.size());
    next += range.count;
    result.push_back(range.count);
  }
  EXPECT_EQ(next, layers);
  return result;
}

Counts with_layout(int64_t layers, int stages, const Json& layout) {
  return counts(layers, {{"pipeline_model_parallel_size", stages}, {"pipeline_model_parallel_layout", layout}});
}

std::string error_of(int64_t layers, const Json& changes) {
  try {
    make(layers, changes);
    return "no error";
  } catch (const std::exception& error) {
    return error.what();
  }
}

std::string layout_error(int64_t layers, int stages, const Json& layout) {
  return error_of(layers, {{"pipeline_model_parallel_size", stages}, {"pipeline_model_parallel_layout", layout}});
}

}  // namespace

TEST(PipelineLayout, Notation) {
  auto parsed = [](const Json& layout) { return parse_pipeline_layout(layout); };
  using Stages = std::vector<std::string>;
  EXPECT_EQ(parsed("Et*3|(tt|)*2,m|L"), (Stages{"Ettt", "tt", "tt", "m", "L"}));
  EXPECT_EQ(parsed("Et*4|t*4tmL"), (Stages{"Etttt", "tttttmL"}));
  EXPECT_EQ(parsed("E||t|L"), (Stages{"E", "", "t", "L"}));
  EXPECT_EQ(parsed("E (t(t|)*2)*2 L"), (Stages{"Ett", "t", "tt", "t", "L"}));
  EXPECT_EQ(parsed(Json::array({"Et*2", "t", "tL"})), (Stages{"Ett", "t", "tL"}));
  EXPECT_EQ(parsed(Json::array({Json::array({"embedding", "decoder"}), Json::array(), Json::array({"t", "loss"})})),
            (Stages{"Et", "", "tL"}));
  for (const Json bad :
       std::vector<Json>{"Et*|L", "E(t|L", "Et)L", "Ex|L", "Et*0|L", "(((t*9999)*9999)*9999)", 7, Json::array(),
                         Json::array({"Et|t", "L"}), Json::array({Json::array({"head"})}), Json::array({3})}) {
    EXPECT_THROW(parse_pipeline_layout(bad), ValueError) << bad;
  }
}

TEST(PipelineLayout, Explicit) {
  EXPECT_EQ(with_layout(4, 2, "Et*3|tL"), (Counts{3, 1}));
  EXPECT_EQ(with_layout(4, 2, "E|t*3|t|L"), (Counts{0, 3, 1, 0}));  // two virtual stages
  EXPECT_EQ(with_layout(61, 16, "Et*3|(tt|)*29,|L"), [] {
    Counts result(32, 2);
    result[0] = 3;
    result[30] = result[31] = 0;
    return result;
  }());
  EXPECT_EQ(with_layout(2, 1, "EttL"), (Counts{2}));
  EXPECT_EQ(make(4, {{"pipeline_model_parallel_size", 2}, {"pipeline_model_parallel_layout", "E|t*3|t|L"}})
                .virtual_pipeline_model_parallel_size,
            2);
}

TEST(PipelineLayout, SizesWithVirtualStages) {
  EXPECT_EQ(counts(8, {{"pipeline_model_parallel_size", 2}, {"virtual_pipeline_model_parallel_size", 2}}),
            (Counts{2, 2, 2, 2}));
  EXPECT_EQ(counts(8, {{"pipeline_model_parallel_size", 2}, {"num_layers_per_virtual_pipeline_stage", 1}}),
            (Counts(8, 1)));
  // Megatron: each rank's layers are split over its chunks.
  EXPECT_EQ(counts(14, {{"pipeline_model_parallel_size", 3},
                        {"virtual_pipeline_model_parallel_size", 2},
                        {"num_layers_in_first_pipeline_stage", 2},
                        {"num_layers_in_last_pipeline_stage", 4}}),
            (Counts{1, 4, 2, 1, 4, 2}));
  EXPECT_EQ(counts(6, {{"pipeline_model_parallel_size", 2},
                       {"virtual_pipeline_model_parallel_size", 2},
                       {"num_layers_in_last_pipeline_stage", 4}}),
            (Counts{1, 2, 1, 2}));
  EXPECT_EQ(counts(6, {{"pipeline_model_parallel_size", 2},
                       {"virtual_pipeline_model_parallel_size", 2},
                       {"account_for_embedding_in_pipeline_split", true},
                       {"account_for_loss_in_pipeline_split", true}}),
            (Counts{1, 2, 2, 1}));
  // Embedding alone, loss alone.
  EXPECT_EQ(counts(2, {{"pipeline_model_parallel_size", 4},
                       {"account_for_embedding_in_pipeline_split", true},
                       {"account_for_loss_in_pipeline_split", true}}),
            (Counts{0, 1, 1, 0}));
}

/// What an error offers must work.
TEST(PipelineLayout, OfferedLayoutsWork) {
  for (int64_t layers = 1; layers <= 13; ++layers) {
    for (int chunks = 1; chunks <= 9; ++chunks) {
      const auto offered = with_layout(layers, chunks, even_layout(layers, chunks));
      const auto [least, most] = std::minmax_element(offered.begin(), offered.end());
      EXPECT_LE(*most - *least, 1);
      EXPECT_LE(offered.front(), offered[(chunks - 1) / 2]);
      EXPECT_LE(offered.back(), offered[(chunks - 1) / 2]);
    }
  }
  EXPECT_EQ(even_layout(30, 4), "Et*7|t*8|t*8|t*7L");
  EXPECT_IN(error_of(30, {{"pipeline_model_parallel_size", 4}}), "Et*7|t*8|t*8|t*7L");
  EXPECT_IN(error_of(30, {{"pipeline_model_parallel_size", 4}}), "use one of 1, 2, 3, 5");
  EXPECT_IN(error_of(30, {{"pipeline_model_parallel_size", 4}, {"virtual_pipeline_model_parallel_size", 2}}),
            "Et*3|t*4|t*4|t*4|t*4|t*4|t*4|t*3L");
  EXPECT_IN(layout_error(30, 4, "Et*7|t*8|t*8|t*8L"), "Et*7|t*8|t*8|t*7L");
  EXPECT_IN(layout_error(30, 4, "Et*10|t*10|t*10L"), "Et*7|t*8|t*8|t*7L");
  EXPECT_IN(error_of(5, {{"pipeline_model_parallel_size", 2},
                         {"virtual_pipeline_model_parallel_size", 2},
                         {"num_layers_in_first_pipeline_stage", 1}}),
            "Et|t*2|t|tL");
}

TEST(PipelineLayout, Contradictions) {
  EXPECT_IN(layout_error(4, 2, "Et*2|t*3L"), "5 decoder layers");
  EXPECT_IN(layout_error(4, 2, "t*2|Et*2L"), "E (embedding)");
  EXPECT_IN(layout_error(4, 2, "Et*2L|t*2"), "L (loss)");
  EXPECT_IN(layout_error(4, 2, "Et*2|t*2mL"), "MTP");
  EXPECT_IN(layout_error(4, 1, "Et*2|t*2L"), "above 1");
  const auto with = [](Json changes) {
    changes["pipeline_model_parallel_size"] = 2;
    return error_of(8, changes);
  };
  EXPECT_IN(with({{"pipeline_model_parallel_layout", "Et*4|t*4L"}, {"virtual_pipeline_model_parallel_size", 2}}),
            "contradicts");
  EXPECT_IN(with({{"pipeline_model_parallel_layout", "Et*4|t*4L"}, {"num_layers_in_first_pipeline_stage", 4}}),
            "says all");
  EXPECT_IN(with({{"num_layers_per_virtual_pipeline_stage", 3}}), "does not divide");
  EXPECT_IN(with({{"num_layers_per_virtual_pipeline_stage", 2}, {"virtual_pipeline_model_parallel_size", 4}}),
            "contradicts");
  EXPECT_IN(with({{"microbatch_group_size_per_vp_stage", 1}}), "at least");
  EXPECT_IN(with({{"pipeline_schedule", "gpipe"}}), "zb-h1");
  EXPECT_IN(with({{"pipeline_schedule", "zb-h1"}, {"virtual_pipeline_model_parallel_size", 2}}), "virtual");
  EXPECT_IN(with({{"pipeline_schedule", "interleaved"}}), "virtual_pipeline_model_parallel_size");
  EXPECT_EQ(with({{"pipeline_schedule", "interleaved"}, {"num_layers_per_virtual_pipeline_stage", 2}}), "no error");
  EXPECT_EQ(with({{"pipeline_schedule", "zb-h1"}}), "no error");
  EXPECT_IN(error_of(8, {{"virtual_pipeline_model_parallel_size", 2}}), "above 1");
}

}  // namespace mcore_bridge
