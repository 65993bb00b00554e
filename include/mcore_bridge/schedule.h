// Pipeline schedules as tables: what each stage does, in order. The executor runs them; the simulator and tests read
// them.
#pragma once

#include <string>
#include <vector>

namespace mcore_bridge {

struct Action {
  enum class Kind { kForward, kBackward, kExchange };
  /// One message of an exchange: the activation (forward) or its gradient (backward) of (chunk, micro_batch), where
  /// `chunk` is always the global chunk that PRODUCED the activation.
  struct Message {
    bool send;
    bool gradient;
    int chunk;
    int micro_batch;
    int peer;  ///< pipeline rank
  };
  Kind kind;
  int chunk = 0;  ///< local chunk (virtual stage) for forward and backward
  int micro_batch = 0;
  std::vector<Message> messages;  ///< kExchange: started together
};

using StageSchedule = std::vector<Action>;

/// One table per pipeline rank. Throws ValueError for sizes that cannot work.
std::vector<StageSchedule> one_forward_one_backward(int stages, int micro_batches);

struct Simulation {
  double bubble_fraction = 0;         ///< idle share of the busiest window, all stages
  std::vector<int> peak_activations;  ///< per stage: micro-batches whose activations live at once
};
/// Plays the tables with unit forward time and `backward_cost` per backward. Throws ValueError on deadlock or when an
/// action uses what never arrived.
Simulation simulate(const std::vector<StageSchedule>& schedule, int micro_batches, double backward_cost = 2.0);

}  // namespace mcore_bridge
