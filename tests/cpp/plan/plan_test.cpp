#include "plan/plan.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <set>

#include "families/family.h"
#include "mcore_bridge/error.h"
#include "tuners/adapter_rules.h"

namespace mcore_bridge {
namespace {

/// Counts how often each element of each Hugging Face tensor is owned, over all ranks and stages.
class Coverage {
 public:
  void add(const ParameterPlan& plan) {
    const auto columns = plan.columns();
    int64_t elements = 1;
    for (const auto size : plan.sizes) elements *= size;
    std::vector<int> local(static_cast<size_t>(elements));
    for (const auto& region : plan.regions) {
      const auto& tensor = plan.tensors[region.tensor];
      auto& owned = owned_[tensor.name];
      owned.resize(static_cast<size_t>(tensor.numel()));
      const auto strides = hf_strides(tensor, region);
      for (int64_t r = 0; r < region.rows; ++r) {
        for (int64_t c = 0; c < region.cols; ++c) {
          owned.at(static_cast<size_t>(strides.offset + r * strides.row + c * strides.col)) += region.owner ? 1 : 0;
          local.at(static_cast<size_t>(region.parameter_row(r) * columns + region.col + c)) += 1;
        }
      }
    }
    for (const int times : local) {
      if (plan.rule.pad_rows) {
        EXPECT_LE(times, 1) << plan.name;
      } else {
        EXPECT_EQ(times, 1) << plan.name;
      }
    }
  }
  void expect_once() const {
    for (const auto& [name, owned] : owned_) {
      for (const int times : owned) ASSERT_EQ(times, 1) << name;
    }
  }
  std::set<std::string> tensors() const {
    std::set<std::string> names;
    for (const auto& [name, owned] : owned_) names.insert(name);
    return names;
  }

 private:
  std::map<std::string, std::vector<int>> owned_;
};

const std::set<std::string> kDense = {"llama", "mistral", "qwen2", "qwen3"};

/// Places of the experts' ranks beside those of the dense layers: any split works for the plan alone.
struct Ranks {
  int tp, ep, etp;
  /// Adds what all ranks of a stage hold.
  void add(Coverage& coverage, const ModelConfig& config, ChunkPlace place,
           const std::function<std::vector<WeightRule>(const std::vector<WeightRule>&)>& choose) const {
    for (int rank = 0; rank < tp; ++rank) {
      for (const auto& plan : make_plan(choose(chunk_weights(config, place)), rank, tp)) {
        if (plan.rule.experts.total == 0) coverage.add(plan);
      }
    }
    if (!config.is_moe()) return;
    for (int e = 0; e < ep; ++e) {
      place.ep_rank = e;
      place.ep_size = ep;
      for (int rank = 0; rank < etp; ++rank) {
        const SplitRanks ranks{.etp_rank = rank, .etp_size = etp};
        for (const auto& plan : make_plan(choose(chunk_weights(config, place)), ranks)) {
          if (plan.rule.experts.total > 0) coverage.add(plan);
        }
      }
    }
  }
};

std::set<std::string> names_of(const std::vector<WeightRule>& rules) {
  std::set<std::string> names;
  for (const auto& plan : make_plan(rules, 0, 1)) {
    for (const auto& tensor : plan.tensors) names.insert(tensor.name);
  }
  return names;
}

ModelConfig tiny(const std::string& family, int groups, bool tied, int tp, int pp) {
  auto fields = ModelConfig::from_hf({{"model_type", family},
                                      {"hidden_size", 24},
                                      {"intermediate_size", 48},
                                      {"num_hidden_layers", 6},
                                      {"num_attention_heads", 12},
                                      {"num_key_value_heads", groups},
                                      {"head_dim", 4},
                                      {"vocab_size", 29},
                                      {"tie_word_embeddings", tied},
                                      {"attention_bias", true},
                                      {"num_experts_per_tok", 2},
                                      {"moe_intermediate_size", 12},
                                      {"shared_expert_intermediate_size", 24},
                                      {kDense.contains(family) ? "unused" : "num_experts", 4},
                                      {"n_shared_experts", 2},
                                      {"num_shared_experts", 2},
                                      {"intermediate_size_mlp", 24},
                                      {"mlp_bias", true}});
  fields["tensor_model_parallel_size"] = tp;
  fields["sequence_parallel"] = true;
  fields["pipeline_model_parallel_size"] = pp;
  auto config = ModelConfig::from_json(fields);
  config.finalize();
  return config;
}

}  // namespace

TEST(Plan, EveryElementOfEveryTensorIsOwnedOnceInEveryLayoutOfEveryFamily) {
  LoraOptions all, parts;
  all.r = parts.r = 3;
  parts.target_modules = {"q_proj", "v_proj", "up_proj", "down_proj", "w1", "w2"};
  parts.modules_to_save = {"embed_tokens", "lm_head", "norm"};
  int layouts = 0;
  for (const auto& family : families()) {
    for (const int groups : {1, 2, 3, 6, 12}) {
      for (const bool tied : {false, true}) {
        for (const int tp : {1, 2, 3, 4, 6, 12}) {
          if (groups % tp != 0 && tp % groups != 0) continue;
          for (const int pp : {1, 2, 3, 6}) {
            const auto config = tiny(family.model_types[0], groups, tied, tp, pp);
            Coverage base, adapter, adapter_parts;
            // Experts are split in their own way, each way once.
            const Ranks ranks{.tp = tp, .ep = pp % 2 == 0 ? 2 : 4, .etp = tp % 2 == 0 ? 2 : 3};
            for (int stage = 0; stage < pp; ++stage) {
              const ChunkPlace place{
                  .layers = config.layers_of(stage, 0), .pre_process = stage == 0, .post_process = stage == pp - 1};
              ranks.add(base, config, place, [](const auto& rules) { return rules; });
              ranks.add(adapter, config, place, [&](const auto& rules) { return adapter_rules(rules, all, "a"); });
              ranks.add(adapter_parts, config, place,
                        [&](const auto& rules) { return adapter_rules(rules, parts, "a"); });
            }
            base.expect_once();
            adapter.expect_once();
            adapter_parts.expect_once();
            const auto whole = chunk_weights(config, {.layers = {0, 6}});
            EXPECT_EQ(base.tensors(), names_of(whole));
            EXPECT_EQ(adapter.tensors(), names_of(adapter_rules(whole, all, "a")));
            EXPECT_EQ(adapter_parts.tensors(), names_of(adapter_rules(whole, parts, "a")));
            if (!config.is_moe()) {
              EXPECT_EQ(adapter.tensors().size(), 6u * 7 * 2);
              EXPECT_EQ(adapter_parts.tensors().size(), 6u * 4 * 2 + 3);
            }
            ++layouts;
          }
        }
      }
    }
  }
  EXPECT_GT(layouts, 500);
}

TEST(Plan, QkvRowsAreGroupedPerKeyValueHead) {
  const WeightRule rule{.name = "qkv",
                        .hf = {"q", "k", "v"},
                        .rows = 16,
                        .cols = 1,
                        .shard = Shard::kColumn,
                        .fuse = Fuse::kQkv,
                        .heads = {4, 2, 2}};
  const auto plan = plan_parameter(rule, 0, 1);
  ASSERT_EQ(plan.regions.size(), 6u);
  // [q0 q1 | k0 | v0 | q2 q3 | k1 | v1]
  EXPECT_EQ(plan.regions[0].rows, 4);
  EXPECT_EQ(plan.regions[1].row, 4);
  EXPECT_EQ(plan.regions[2].row, 6);
  EXPECT_EQ(plan.regions[3].hf_row, 4);
  EXPECT_EQ(plan.regions[3].row, 8);
}

TEST(Plan, KeyValueHeadsAreRepeatedOverNeighbours) {
  const WeightRule rule{.name = "qkv",
                        .hf = {"q", "k", "v"},
                        .rows = 16,
                        .cols = 1,
                        .shard = Shard::kColumn,
                        .fuse = Fuse::kQkv,
                        .heads = {4, 2, 2}};
  const auto first = plan_parameter(rule, 2, 4), second = plan_parameter(rule, 3, 4);
  EXPECT_EQ(first.sizes, (std::vector<int64_t>{6, 1}));
  EXPECT_EQ(first.regions[1].hf_row, second.regions[1].hf_row);
  EXPECT_TRUE(first.regions[1].owner);
  EXPECT_FALSE(second.regions[1].owner);
  EXPECT_NE(first.regions[0].hf_row, second.regions[0].hf_row);
}

TEST(Plan, RefusesWhatDoesNotDivide) {
  EXPECT_THROW(plan_parameter({.name = "w", .hf = {"w"}, .rows = 7, .cols = 4, .shard = Shard::kColumn}, 0, 2),
               ValueError);
  EXPECT_THROW(plan_parameter({.name = "w", .hf = {"w"}, .rows = 4, .cols = 7, .shard = Shard::kRow}, 0, 2),
               ValueError);
  EXPECT_NO_THROW(plan_parameter(
      {.name = "w", .hf = {"w"}, .rows = 7, .cols = 4, .shard = Shard::kColumn, .pad_rows = true}, 0, 2));
}

}  // namespace mcore_bridge
