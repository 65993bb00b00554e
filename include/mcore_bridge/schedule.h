// Pipeline schedules as tables: what each stage does, in order. The executor runs them; the simulator, the planner and
// the tests read them. Pure data: no torch, no communication.
#pragma once

#include <compare>
#include <string>
#include <vector>

namespace mcore_bridge {

/// A stage (pipeline rank) r of p holds chunks (virtual stages) 0, 1, ... of the model; its local chunk c is the global
/// chunk c * p + r, the c * p + r-th part of the model that a token visits.
struct Action {
  enum class Kind {
    kForward,
    kBackward,        ///< both halves of backward at once
    kBackwardInput,   ///< the gradient of the chunk's input only; work on weight gradients is put aside
    kBackwardWeight,  ///< the work put aside
    kStart,           ///< messages begin; nobody waits
    kWait,            ///< receives: their tensors are there; sends: their tensors are free
  };
  /// The activation (or with `gradient` its gradient) of (chunk, micro_batch), where `chunk` is always the global chunk
  /// that PRODUCED the activation.
  struct Message {
    bool send;
    bool gradient;
    int chunk;
    int micro_batch;
    int peer;  ///< pipeline rank
    auto operator<=>(const Message&) const = default;
  };
  Kind kind;
  int chunk = 0;  ///< local chunk, for the computing kinds
  int micro_batch = 0;
  std::vector<Message> messages;  ///< kStart, kWait

  bool computes() const { return kind != Kind::kStart && kind != Kind::kWait; }
};

/// One stage's row. In all tables here: messages from one stage to another are started in the same order on both sides
/// (what back ends that match by order need), the receive of an action is started one computation ahead of it, and a
/// sent tensor is waited for as soon as that costs no time, so that it can be freed.
using StageSchedule = std::vector<Action>;

/// All kinds throw ValueError for sizes below 1 or kinds that do not go with them. `chunks`: per stage.
std::vector<StageSchedule> one_forward_one_backward(int stages, int micro_batches);
/// Interleaved 1F1B (https://arxiv.org/abs/2104.04473): every chunk takes a group of micro-batches in turn. Groups hold
/// `group_size` (0: as many as there are stages) micro-batches; a remainder smaller than the number of stages is spread
/// over the groups, so any number of micro-batches goes.
std::vector<StageSchedule> interleaved(int stages, int chunks, int micro_batches, int group_size = 0);
/// ZB-H1 (https://arxiv.org/abs/2401.10241): weight gradients fill the bubble, at most `stages` micro-batches live.
std::vector<StageSchedule> zero_bubble_h1(int stages, int micro_batches);
/// For evaluation.
std::vector<StageSchedule> forward_only(int stages, int chunks, int micro_batches, int group_size = 0);

struct ScheduleOptions {
  std::string name = "1f1b";  ///< ModelConfig::pipeline_schedule; 1f1b with several chunks is interleaved
  int stages = 1, chunks = 1, micro_batches = 1;
  int group_size = 0;  ///< ModelConfig::microbatch_group_size_per_vp_stage
};
std::vector<StageSchedule> make_schedule(const ScheduleOptions& options);
/// The computations of the same table, without its messages.
std::vector<StageSchedule> schedule_order(const ScheduleOptions& options);

/// What one micro-batch costs in one global chunk; any unit of time and of memory.
struct ChunkCost {
  double forward = 1, backward_input = 1, backward_weight = 1;
  double activation = 1;     ///< memory from forward to backward
  double weight_inputs = 1;  ///< the part of it that waits for kBackwardWeight
};
struct SimulationCosts {
  std::vector<ChunkCost> chunks;  ///< by global chunk; one entry: all alike; empty: all 1
  double exchange = 0;            ///< time of one message between stages
};

struct Simulation {
  struct Span {
    int stage;
    Action::Kind kind;
    int chunk;  ///< local
    int micro_batch;
    double start, end;
  };
  struct Transfer {
    int from, to;  ///< stages
    bool gradient;
    int chunk;  ///< global, as in Action::Message
    int micro_batch;
    double sent, moved;  ///< when the sender started it, when it was there
  };
  double time = 0;             ///< from the first start to the last end over all stages
  double bubble_fraction = 0;  ///< idle share of time x stages
  std::vector<int>
      peak_activations;             ///< per stage: most (chunk, micro-batch) pairs from forward to the end of backward
  std::vector<double> peak_memory;  ///< per stage: the same weighted by ChunkCost
  std::vector<Span> spans;          ///< every computation, in order of the tables, stage by stage
  std::vector<Transfer> transfers;  ///< every message
};

/// Plays the tables: a message moves once both sides have started it and the ones before it have moved; computation and
/// messages overlap. Throws ValueError when the tables deadlock, leave something out, repeat it, or use what never
/// came.
Simulation simulate(const std::vector<StageSchedule>& schedule, const SimulationCosts& costs = {});

}  // namespace mcore_bridge
