#include "mcore_bridge/schedule.h"

#include <gtest/gtest.h>

#include <map>

#include "mcore_bridge/error.h"

namespace mcore_bridge {

TEST(Schedule, OneForwardOneBackward) {
  for (int stages = 1; stages <= 8; ++stages) {
    for (int batches = 1; batches <= 16; ++batches) {
      const auto schedule = one_forward_one_backward(stages, batches);
      const auto result = simulate(schedule, batches);  // throws on deadlock, repetition or omission
      EXPECT_NEAR(result.bubble_fraction, static_cast<double>(stages - 1) / (batches + stages - 1), 1e-9);
      for (int stage = 0; stage < stages; ++stage)
        EXPECT_EQ(result.peak_activations[stage], std::min(batches, stages - stage));
    }
  }
}

/// Messages of one pair of stages come in the same order on both sides, each direction for itself: what back ends that
/// match by order need.
TEST(Schedule, MessagesMatchInOrder) {
  using Key = std::tuple<bool, int, int>;
  for (int stages = 2; stages <= 6; ++stages) {
    const auto schedule = one_forward_one_backward(stages, 7);
    std::map<std::pair<int, int>, std::vector<Key>> sent, received;
    for (int stage = 0; stage < stages; ++stage) {
      for (const auto& action : schedule[stage]) {
        for (const auto& message : action.messages) {
          auto& list = message.send ? sent[{stage, message.peer}] : received[{message.peer, stage}];
          list.emplace_back(message.gradient, message.chunk, message.micro_batch);
        }
      }
    }
    EXPECT_EQ(sent, received);
  }
}

TEST(Schedule, SimulatorFindsDeadlocks) {
  auto schedule = one_forward_one_backward(2, 2);
  // The second stage now waits for a gradient before it has sent what the first needs.
  std::swap(schedule[1][0], schedule[1][2]);
  EXPECT_THROW(simulate(schedule, 2), ValueError);
  auto missing = one_forward_one_backward(2, 2);
  missing[0].pop_back();
  EXPECT_THROW(simulate(missing, 2), ValueError);
  EXPECT_THROW(one_forward_one_backward(0, 1), ValueError);
}

}  // namespace mcore_bridge
