#include "mcore_bridge/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using Kind = Action::Kind;
using Table = std::vector<StageSchedule>;

struct Case {
  std::string name;
  int stages, chunks, micro_batches, group;
  Table table;
  std::string text() const {
    return name + " pp " + std::to_string(stages) + " vpp " + std::to_string(chunks) + " micro-batches " +
           std::to_string(micro_batches) + " groups of " + std::to_string(group);
  }
};

/// Every schedule for every size up to pp 8, vpp 4 and 16 micro-batches; groups of the default and larger sizes.
void for_all(const std::function<void(const Case&)>& check) {
  for (int stages = 1; stages <= 8; ++stages) {
    for (int batches = 1; batches <= 16; ++batches) {
      check({"1f1b", stages, 1, batches, 0, one_forward_one_backward(stages, batches)});
      check({"zb-h1", stages, 1, batches, 0, zero_bubble_h1(stages, batches)});
      for (int chunks = 1; chunks <= 4; ++chunks) {
        if (stages == 1 && chunks > 1) continue;
        for (const int group : {0, stages + 1, 2 * stages}) {
          check({"interleaved", stages, chunks, batches, group, interleaved(stages, chunks, batches, group)});
          check({"forward-only", stages, chunks, batches, group, forward_only(stages, chunks, batches, group)});
        }
      }
    }
  }
}

std::string error_of(const Table& table) {
  try {
    simulate(table);
    return "no error";
  } catch (const ValueError& error) {
    return error.what();
  }
}

}  // namespace

/// simulate() throws on deadlock, omission, repetition, a message that crosses another or is never used.
TEST(Schedule, AllTablesAreComplete) {
  for_all([](const Case& c) { ASSERT_EQ(error_of(c.table), "no error") << c.text(); });
}

TEST(Schedule, BubbleFractions) {
  for_all([](const Case& c) {
    const double found = simulate(c.table).bubble_fraction;
    const double p = c.stages, m = c.micro_batches, v = c.chunks;
    // Idle time in units of a chunk's forward, input gradient and weight gradient, each 1.
    const double one_f_one_b = (p - 1) / (m + p - 1);
    if (c.name == "1f1b") {
      ASSERT_NEAR(found, one_f_one_b, 1e-9) << c.text();
    } else if (c.name == "interleaved" && m >= p) {
      ASSERT_NEAR(found, (p - 1) / v / (m + (p - 1) / v), 1e-9) << c.text();
    } else if (c.name == "interleaved") {
      ASSERT_LE(found, (p * v - 1) / (m + p * v - 1) + 1e-9) << c.text();  // as a pipeline of p * v stages
    } else if (c.name == "zb-h1" && m >= p) {
      ASSERT_NEAR(found, (p - 1) / (3 * m + p - 1), 1e-9) << c.text();  // (p - 1) (F + I - W)
    } else if (c.name == "zb-h1") {
      ASSERT_LE(found, one_f_one_b + 1e-9) << c.text();  // too few micro-batches to fill the bubble with
    }
  });
}

TEST(Schedule, PeakActivations) {
  for_all([](const Case& c) {
    if (c.name == "forward-only") return;
    const auto peaks = simulate(c.table).peak_activations;
    for (int stage = 0; stage < c.stages; ++stage) {
      if (c.name == "1f1b") {
        ASSERT_EQ(peaks[stage], std::min(c.micro_batches, c.stages - stage)) << c.text();
      } else if (c.name == "zb-h1") {
        ASSERT_LE(peaks[stage], std::min(c.micro_batches, c.stages)) << c.text();
      } else if (c.micro_batches % c.stages == 0 && c.group == 0) {
        const int warm_up = (c.chunks - 1) * c.stages + 2 * (c.stages - 1 - stage) + 1;
        ASSERT_EQ(peaks[stage], std::min(c.micro_batches * c.chunks, warm_up)) << c.text();
      }
    }
  });
}

/// What the executor counts on: receives start before the computation in front of the one that needs them, sends are
/// waited for, and nothing of the messages costs time when computations take alike long.
TEST(Schedule, ReceivesAreStartedAhead) {
  for_all([](const Case& c) {
    for (const auto& row : c.table) {
      std::map<Action::Message, int> started;  // at which computation
      int computation = 0;
      for (const auto& action : row) {
        if (action.computes()) ++computation;
        for (const auto& message : action.messages) {
          if (action.kind == Kind::kStart) {
            ASSERT_TRUE(started.emplace(message, computation).second) << c.text();
          } else {
            ASSERT_TRUE(started.contains(message)) << c.text();
            if (!message.send) {
              ASSERT_TRUE(started[message] < computation || computation == 0) << c.text();
            }
            started.erase(message);
          }
        }
      }
      ASSERT_TRUE(started.empty()) << c.text();
    }
  });
}

TEST(Schedule, ExchangesHideBehindComputation) {
  // Messages take half a computation. Steady state hides them; only the way in and out shows them.
  const SimulationCosts costs{.chunks = {{.forward = 1, .backward_input = 1, .backward_weight = 1}}, .exchange = 0.5};
  const auto slow = simulate(one_forward_one_backward(4, 64), costs), fast = simulate(one_forward_one_backward(4, 64));
  EXPECT_LE(slow.time, fast.time + 64 * 1.0 + 6 * 0.5);
  EXPECT_LT(simulate(interleaved(4, 2, 64), costs).bubble_fraction, slow.bubble_fraction);
}

TEST(Schedule, UnevenCosts) {
  // The slowest chunk sets the pace.
  std::vector<ChunkCost> chunks(4);
  chunks[3] = {.forward = 2, .backward_input = 2, .backward_weight = 2, .activation = 5, .weight_inputs = 3};
  const auto result = simulate(one_forward_one_backward(4, 8), {.chunks = chunks});
  EXPECT_DOUBLE_EQ(result.time, 3 + 8 * 6 + 6);
  EXPECT_DOUBLE_EQ(result.peak_memory[3], 5);
  EXPECT_DOUBLE_EQ(result.peak_memory[0], 4);
  EXPECT_THROW(simulate(one_forward_one_backward(4, 8), {.chunks = std::vector<ChunkCost>(3)}), ValueError);
}

TEST(Schedule, Groups) {
  // A group takes all its micro-batches through a chunk before the next chunk's turn.
  std::vector<std::pair<int, int>> forwards;
  for (const auto& action : interleaved(2, 2, 8, 4)[1]) {
    if (action.kind == Kind::kForward) forwards.emplace_back(action.chunk, action.micro_batch);
  }
  EXPECT_EQ(forwards, (std::vector<std::pair<int, int>>{{0, 0},
                                                        {0, 1},
                                                        {0, 2},
                                                        {0, 3},
                                                        {1, 0},
                                                        {1, 1},
                                                        {1, 2},
                                                        {1, 3},
                                                        {0, 4},
                                                        {0, 5},
                                                        {0, 6},
                                                        {0, 7},
                                                        {1, 4},
                                                        {1, 5},
                                                        {1, 6},
                                                        {1, 7}}));
  EXPECT_THROW(interleaved(4, 2, 8, 3), ValueError);
  EXPECT_THROW(interleaved(1, 2, 8), ValueError);
  EXPECT_THROW(one_forward_one_backward(0, 1), ValueError);
  EXPECT_THROW(make_schedule({.name = "zb-h1", .stages = 2, .chunks = 2}), ValueError);
  EXPECT_THROW(make_schedule({.name = "gpipe"}), ValueError);
}

TEST(Schedule, SimulatorFindsMistakes) {
  const auto good = one_forward_one_backward(2, 2);
  auto find = [](StageSchedule& row, auto test) { return std::find_if(row.begin(), row.end(), test); };
  auto computing = [](Kind kind, int batch) {
    return [=](const Action& a) { return a.kind == kind && a.micro_batch == batch; };
  };
  auto table = good;  // the last stage wants the second micro-batch first
  std::swap(*find(table[1], computing(Kind::kForward, 0)), *find(table[1], computing(Kind::kForward, 1)));
  EXPECT_NE(error_of(table), "no error");
  table = good;  // the first stage waits for a gradient before it sends what the gradient needs
  std::rotate(table[0].begin(), std::prev(table[0].end()), table[0].end());
  EXPECT_NE(error_of(table), "no error");
  table = good;
  table[0].erase(find(table[0], computing(Kind::kBackward, 1)));
  EXPECT_NE(error_of(table), "no error");
  table = good;
  table[1].push_back(*find(table[1], computing(Kind::kBackward, 1)));
  EXPECT_NE(error_of(table), "no error");
  table = good;  // a message less: the other side waits for ever
  for (auto& action : table[0]) {
    std::erase_if(action.messages, [](const auto& message) { return message.send && message.micro_batch == 1; });
  }
  EXPECT_NE(error_of(table).find("deadlock"), std::string::npos) << error_of(table);
  auto split = zero_bubble_h1(2, 2);
  split[0].erase(find(split[0], computing(Kind::kBackwardWeight, 0)));
  EXPECT_NE(error_of(split).find("never finishes"), std::string::npos);
}

}  // namespace mcore_bridge
