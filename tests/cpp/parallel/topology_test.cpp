#include "mcore_bridge/topology.h"

#include <gtest/gtest.h>

#include <set>

#include "mcore_bridge/error.h"

namespace mcore_bridge {

TEST(Topology, MegatronsOrder) {
  const Topology topology({.tensor = 2, .pipeline = 2, .context = 2, .expert = 2, .expert_tensor = 1}, 16);
  EXPECT_EQ(topology.sizes().data, 2);
  EXPECT_EQ(topology.group_of(GroupKind::kTensor, 5), (std::vector<int>{4, 5}));
  EXPECT_EQ(topology.group_of(GroupKind::kContext, 5), (std::vector<int>{5, 7}));
  EXPECT_EQ(topology.group_of(GroupKind::kData, 1), (std::vector<int>{1, 5}));
  EXPECT_EQ(topology.group_of(GroupKind::kDataContext, 0), (std::vector<int>{0, 2, 4, 6}));
  EXPECT_EQ(topology.group_of(GroupKind::kPipeline, 3), (std::vector<int>{3, 11}));
  EXPECT_EQ(topology.group_of(GroupKind::kModel, 0), (std::vector<int>{0, 1, 8, 9}));
  EXPECT_EQ(topology.group_of(GroupKind::kExpert, 3), (std::vector<int>{2, 3}));
  EXPECT_EQ(topology.group_of(GroupKind::kExpertData, 0), (std::vector<int>{0, 2, 4, 6}));
}

TEST(Topology, ExpertsWidenACopyOfTheModel) {
  const Topology topology({.tensor = 2, .pipeline = 2, .expert = 4, .expert_tensor = 1}, 16);
  EXPECT_EQ(topology.group_of(GroupKind::kModel, 5), (std::vector<int>{4, 5, 6, 7, 12, 13, 14, 15}));
  const Topology narrow({.tensor = 4, .expert = 2, .expert_tensor = 1}, 8);
  EXPECT_EQ(narrow.group_of(GroupKind::kModel, 5), (std::vector<int>{4, 5, 6, 7}));
}

TEST(Topology, EveryGroupKindPartitionsTheWorld) {
  for (int tensor : {1, 2, 3}) {
    for (int context : {1, 2}) {
      for (int pipeline : {1, 2, 3}) {
        for (int data : {1, 2}) {
          const int world = tensor * context * pipeline * data;
          const Topology topology({.tensor = tensor,
                                   .pipeline = pipeline,
                                   .context = context,
                                   .expert = data * context,
                                   .expert_tensor = tensor},
                                  world);
          for (const auto kind : all_group_kinds()) {
            std::multiset<int> seen;
            for (const auto& group : topology.groups(kind)) seen.insert(group.begin(), group.end());
            std::set<int> once(seen.begin(), seen.end());
            EXPECT_EQ(seen.size(), once.size()) << group_name(kind);
            const int expected = kind == GroupKind::kEmbedding && pipeline > 2 ? world / pipeline * 2 : world;
            EXPECT_EQ(static_cast<int>(seen.size()), expected) << group_name(kind);
          }
          for (int rank = 0; rank < world; ++rank) {
            const auto at = topology.coordinates(rank);
            EXPECT_EQ(topology.rank_of(at.tp, at.cp, at.dp, at.pp), rank);
          }
        }
      }
    }
  }
}

TEST(Topology, RefusesWhatDoesNotDivide) {
  EXPECT_THROW(Topology({.tensor = 4}, 6), ValueError);
  EXPECT_THROW(Topology({.expert = 3}, 4), ValueError);
  EXPECT_THROW(Topology({.tensor = 0}, 4), ValueError);
  EXPECT_THROW(Topology({}, 4).coordinates(4), ValueError);
  EXPECT_THROW(Topology({.tensor = 65536, .pipeline = 65536}, 4), ValueError) << "the product overflows int";
  EXPECT_THROW(Topology({.expert = 65536, .expert_tensor = 65536}, 4), ValueError);
}

}  // namespace mcore_bridge
