#include "parallel/random.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace mcore_bridge {
namespace {

ParallelState place(ParallelSizes sizes, int rank) {
  ParallelState state;
  state.topology = Topology(sizes, sizes.world());
  state.rank = rank;
  state.place = state.topology.coordinates(rank);
  return state;
}

at::Tensor draw(RandomStream stream, const ParallelState& parallel) {
  const RandomScope scope(stream, parallel, c10::kCPU);
  return at::rand({8});
}

void start(uint64_t seed) {
  at::manual_seed(seed);
  reset_random_streams();
}

}  // namespace

TEST(RandomScope, OneRankIsTheDefaultGenerator) {
  start(3);
  const auto expected = at::rand({8});
  start(3);
  EXPECT_TRUE(at::equal(draw(RandomStream::kSplit, place({}, 0)), expected));
}

TEST(RandomScope, RanksDrawAlikeOrApart) {
  const ParallelSizes sizes{.tensor = 2, .context = 2, .data = 2};
  std::vector<at::Tensor> split, replicated;
  for (int rank = 0; rank < 8; ++rank) {
    start(3);
    split.push_back(draw(RandomStream::kSplit, place(sizes, rank)));
    replicated.push_back(draw(RandomStream::kReplicated, place(sizes, rank)));
  }
  for (int a = 0; a < 8; ++a) {
    for (int b = 0; b < 8; ++b) {
      const bool tp = a % 2 == b % 2, cp = a / 2 % 2 == b / 2 % 2;  // the data rank never matters
      EXPECT_EQ(at::equal(split[a], split[b]), tp && cp) << a << " " << b;
      EXPECT_EQ(at::equal(replicated[a], replicated[b]), cp) << a << " " << b;
    }
    EXPECT_FALSE(at::equal(split[a], replicated[a]));
  }
}

TEST(RandomScope, LeavesTheDefaultGeneratorAlone) {
  const auto parallel = place({.tensor = 2}, 1);
  start(5);
  const auto expected = at::rand({4});
  start(5);
  const auto first = draw(RandomStream::kSplit, parallel), second = draw(RandomStream::kSplit, parallel);
  EXPECT_FALSE(at::equal(first, second)) << "the stream does not go on";
  EXPECT_TRUE(at::equal(at::rand({4}), expected));
  at::manual_seed(6);  // another seed starts the streams anew
  EXPECT_FALSE(at::equal(draw(RandomStream::kSplit, parallel), first));
  start(5);
  EXPECT_TRUE(at::equal(draw(RandomStream::kSplit, parallel), first));
}

TEST(RandomState, ComesBack) {
  const auto parallel = place({.tensor = 2}, 0);
  start(9);
  draw(RandomStream::kSplit, parallel);
  const auto state = random_state(c10::kCPU);
  const auto split = draw(RandomStream::kSplit, parallel), plain = at::rand({4});
  draw(RandomStream::kReplicated, parallel);
  set_random_state(c10::kCPU, state);
  EXPECT_TRUE(at::equal(draw(RandomStream::kSplit, parallel), split));
  EXPECT_TRUE(at::equal(at::rand({4}), plain));
  EXPECT_THROW(set_random_state(c10::kCPU, {state[0]}), std::exception);
}

}  // namespace mcore_bridge
