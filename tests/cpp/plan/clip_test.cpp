#include "plan/clip.h"

#include <gtest/gtest.h>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// For every local element: (tensor, element of the Hugging Face tensor), or -1 for padding.
std::vector<std::pair<int, int64_t>> places(const ParameterPlan& plan, const std::vector<Region>& regions) {
  const auto cols = plan.columns();
  int64_t count = 1;
  for (const auto size : plan.sizes) count *= size;
  std::vector<std::pair<int, int64_t>> result(static_cast<size_t>(count), {-1, -1});
  for (const auto& region : regions) {
    for (int64_t r = 0; r < region.rows; ++r) {
      for (int64_t c = 0; c < region.cols; ++c) {
        auto& place = result.at(static_cast<size_t>(region.parameter_row(r) * cols + region.col + c));
        EXPECT_EQ(place.first, -1) << plan.name << " covers an element twice";
        const auto at = hf_strides(plan.tensors[region.tensor], region);
        place = {region.tensor, at.offset + r * at.row + c * at.col};
      }
    }
  }
  return result;
}

std::vector<WeightRule> rules() {
  return {
      {.name = "norm", .hf = {"n"}, .rows = 7},
      {.name = "row", .hf = {"o"}, .rows = 5, .cols = 12, .shard = Shard::kRow},
      {.name = "gate_up", .hf = {"g", "u"}, .rows = 16, .cols = 3, .shard = Shard::kColumn, .fuse = Fuse::kGateUp},
      {.name = "qkv",
       .hf = {"q", "k", "v"},
       .rows = 2 * 16,
       .cols = 5,
       .shard = Shard::kColumn,
       .fuse = Fuse::kQkv,
       .heads = {.heads = 8, .groups = 4, .head_dim = 2}},
      {.name = "one_group",
       .hf = {"q", "k", "v"},
       .rows = 2 * 10,
       .cols = 3,
       .shard = Shard::kColumn,
       .fuse = Fuse::kQkv,
       .heads = {.heads = 8, .groups = 1, .head_dim = 2}},
      {.name = "interleaved",
       .hf = {"gu", "gu"},
       .rows = 16,
       .cols = 3,
       .shard = Shard::kColumn,
       .fuse = Fuse::kInterleaved,
       .experts = {.total = 3, .first = 0, .count = 3, .grouped = true, .stacked = true},
       .transposed = true},
      {.name = "words", .hf = {"e"}, .rows = 13, .cols = 4, .shard = Shard::kColumn, .pad_rows = true},
  };
}

}  // namespace

/// Every range of every parameter: exactly its elements, each with the place the whole plan gives it.
TEST(Clip, EveryRange) {
  for (const auto& rule : rules()) {
    for (const int size : {1, 2, 4}) {
      for (int rank = 0; rank < size; ++rank) {
        const auto plan = plan_parameter(rule, {.tp_rank = rank, .tp_size = size, .etp_rank = rank, .etp_size = size});
        const auto whole = places(plan, plan.regions);
        const auto count = static_cast<int64_t>(whole.size());
        for (int64_t begin = 0; begin <= count; ++begin) {
          for (int64_t end = begin; end <= count; ++end) {
            const auto part = clip(plan, begin, end);
            if (rule.fuse != Fuse::kInterleaved) ASSERT_LE(part.size(), 3 * plan.regions.size());
            const auto found = places(plan, part);
            for (int64_t i = 0; i < count; ++i) {
              const auto expected = begin <= i && i < end ? whole[i] : std::pair<int, int64_t>{-1, -1};
              ASSERT_EQ(found[i], expected) << rule.name << " [" << begin << ", " << end << ") at " << i;
            }
          }
        }
      }
    }
  }
}

TEST(Clip, KeepsOwners) {
  for (int rank = 0; rank < 2; ++rank) {
    const auto plan = plan_parameter(rules()[0], rank, 2);
    EXPECT_EQ(clip(plan, 2, 5).at(0).owner, rank == 0);
  }
}

TEST(Clip, RefusesWhatIsNoPart) {
  const auto plan = plan_parameter(rules()[0], 0, 1);
  EXPECT_THROW(clip(plan, -1, 3), ValueError);
  EXPECT_THROW(clip(plan, 4, 3), ValueError);
  EXPECT_THROW(clip(plan, 0, 8), ValueError);
  EXPECT_TRUE(clip(plan, 3, 3).empty());
}

}  // namespace mcore_bridge
