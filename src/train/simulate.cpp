// Plays schedule tables without a model.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "mcore_bridge/error.h"
#include "mcore_bridge/schedule.h"

namespace mcore_bridge {
namespace {

using Kind = Action::Kind;
using Message = Action::Message;
using Key = std::tuple<bool, int, int>;  // gradient, global chunk, micro-batch

Key key_of(const Message& message) { return {message.gradient, message.chunk, message.micro_batch}; }

std::string described(const Key& key) {
  return std::string(std::get<0>(key) ? "gradient" : "activation") + " of chunk " + std::to_string(std::get<1>(key)) +
         ", micro-batch " + std::to_string(std::get<2>(key));
}

/// Messages from one stage to another: the k-th send meets the k-th receive.
struct Channel {
  std::vector<std::pair<Key, double>> sent, wanted;  // what and when
  std::map<Key, std::pair<double, double>> moved;    // when it was sent, when it was there

  void settle(double cost) {
    while (settled_ < std::min(sent.size(), wanted.size())) {
      const auto& [key, time] = sent[settled_];
      MCB_CHECK(key == wanted[settled_].first, "schedule: messages cross: ", described(key), " is sent, ",
                described(wanted[settled_].first), " is expected");
      last_ = std::max({time, wanted[settled_].second, last_}) + cost;
      moved[key] = {time, last_};
      ++settled_;
    }
  }

 private:
  size_t settled_ = 0;
  double last_ = 0;
};

enum class Progress { kNone, kForward, kInput, kDone };

struct Stage {
  size_t next = 0;
  double clock = 0, busy = 0, memory = 0;
  int live = 0;
  std::map<std::pair<int, int>, Progress> progress;  // by local chunk and micro-batch
  std::set<Key> arrived, produced, sending;
};

class Player {
 public:
  Player(const std::vector<StageSchedule>& schedule, const SimulationCosts& costs)
      : schedule_(schedule), costs_(costs), count_(static_cast<int>(schedule.size())), stages_(schedule.size()) {
    result_.peak_activations.resize(count_);
    result_.peak_memory.resize(count_);
    spans_.resize(count_);
    for (int stage = 0; stage < count_; ++stage) {
      for (const auto& action : schedule[stage]) {
        if (!action.computes()) continue;
        chunks_ = std::max(chunks_, action.chunk + 1);
        micro_batches_ = std::max(micro_batches_, action.micro_batch + 1);
        forward_only_ = forward_only_ && action.kind == Kind::kForward;
      }
    }
    MCB_CHECK(costs.chunks.size() <= 1 || costs.chunks.size() == static_cast<size_t>(count_ * chunks_),
              "schedule: costs of ", costs.chunks.size(), " chunks are given, there are ", count_ * chunks_);
  }

  Simulation run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (int stage = 0; stage < count_; ++stage) {
        while (stages_[stage].next < schedule_[stage].size() && step(stage, schedule_[stage][stages_[stage].next])) {
          ++stages_[stage].next;
          moved = true;
        }
      }
    }
    double work = 0;
    for (int stage = 0; stage < count_; ++stage) {
      check_complete(stage);
      result_.time = std::max(result_.time, stages_[stage].clock);
      work += stages_[stage].busy;
      result_.spans.insert(result_.spans.end(), spans_[stage].begin(), spans_[stage].end());
    }
    for (const auto& [ends, channel] : channels_) {
      for (const auto& [key, times] : channel.moved) {
        result_.transfers.push_back(
            {ends.first, ends.second, std::get<0>(key), std::get<1>(key), std::get<2>(key), times.first, times.second});
      }
    }
    result_.bubble_fraction = result_.time > 0 ? 1 - work / (result_.time * count_) : 0;
    return std::move(result_);
  }

 private:
  /// False: the action has to wait for another stage.
  bool step(int stage, const Action& action) {
    if (action.kind == Kind::kStart) return start(stage, action.messages);
    if (action.kind == Kind::kWait) return wait(stage, action.messages);
    compute(stage, action);
    return true;
  }

  Channel& channel(int stage, const Message& message) {
    return message.send ? channels_[{stage, message.peer}] : channels_[{message.peer, stage}];
  }

  bool start(int stage, const std::vector<Message>& messages) {
    for (const auto& message : messages) {
      const auto key = key_of(message);
      auto& on = channel(stage, message);
      if (message.send) {
        MCB_CHECK(stages_[stage].produced.erase(key) == 1, "schedule: stage ", stage, " sends the ", described(key),
                  ", which it does not have");
        stages_[stage].sending.insert(key);
      }
      (message.send ? on.sent : on.wanted).emplace_back(key, stages_[stage].clock);
      on.settle(costs_.exchange);
    }
    return true;
  }

  bool wait(int stage, const std::vector<Message>& messages) {
    double until = stages_[stage].clock;
    for (const auto& message : messages) {
      const auto& moved = channel(stage, message).moved;
      const auto found = moved.find(key_of(message));
      if (found == moved.end()) return false;
      until = std::max(until, found->second.second);
    }
    for (const auto& message : messages) {
      if (message.send) {
        MCB_CHECK(stages_[stage].sending.erase(key_of(message)) == 1, "schedule: stage ", stage,
                  " waits twice for the ", described(key_of(message)));
      } else {
        stages_[stage].arrived.insert(key_of(message));
      }
    }
    stages_[stage].clock = until;
    return true;
  }

  void compute(int stage, const Action& action) {
    auto& at = stages_[stage];
    const int global = action.chunk * count_ + stage, last = count_ * chunks_ - 1;
    auto& progress = at.progress[{action.chunk, action.micro_batch}];
    auto bad = [&](const char* what) {
      fail("schedule: stage ", stage, " ", what, " chunk ", action.chunk, ", micro-batch ", action.micro_batch);
    };
    auto take = [&](const Key& key) {
      MCB_CHECK(at.arrived.erase(key) == 1, "schedule: stage ", stage, " uses the ", described(key),
                ", which has not come");
    };
    const auto cost = costs_.chunks.empty()       ? ChunkCost{}
                      : costs_.chunks.size() == 1 ? costs_.chunks[0]
                                                  : costs_.chunks[global];
    double time = 0;
    if (action.kind == Kind::kForward) {
      if (progress != Progress::kNone) bad("repeats the forward of");
      if (global > 0) take({false, global - 1, action.micro_batch});
      if (global < last) at.produced.insert({false, global, action.micro_batch});
      progress = Progress::kForward;
      time = cost.forward;
      at.memory += cost.activation;
      ++at.live;
      result_.peak_activations[stage] = std::max(result_.peak_activations[stage], at.live);
      result_.peak_memory[stage] = std::max(result_.peak_memory[stage], at.memory);
    } else if (action.kind == Kind::kBackwardWeight) {
      if (progress != Progress::kInput) bad("has no weight gradients put aside of");
      progress = Progress::kDone;
      time = cost.backward_weight;
      at.memory -= cost.weight_inputs;
      --at.live;
    } else {
      if (progress != Progress::kForward) bad("cannot reverse");
      if (global < last) take({true, global, action.micro_batch});
      if (global > 0) at.produced.insert({true, global - 1, action.micro_batch});
      const bool whole = action.kind == Kind::kBackward;
      progress = whole ? Progress::kDone : Progress::kInput;
      time = cost.backward_input + (whole ? cost.backward_weight : 0);
      at.memory -= whole ? cost.activation : cost.activation - cost.weight_inputs;
      at.live -= whole ? 1 : 0;
    }
    spans_[stage].push_back({stage, action.kind, action.chunk, action.micro_batch, at.clock, at.clock + time});
    at.clock += time;
    at.busy += time;
  }

  void check_complete(int stage) const {
    const auto& at = stages_[stage];
    MCB_CHECK(at.next == schedule_[stage].size(), "schedule: deadlock, stage ", stage, " waits in action ", at.next);
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      for (int batch = 0; batch < micro_batches_; ++batch) {
        const auto found = at.progress.find({chunk, batch});
        MCB_CHECK(found != at.progress.end() && found->second == (forward_only_ ? Progress::kForward : Progress::kDone),
                  "schedule: stage ", stage, " never finishes chunk ", chunk, ", micro-batch ", batch);
      }
    }
    for (const auto* left : {&at.arrived, &at.produced, &at.sending}) {
      if (!left->empty()) fail("schedule: stage ", stage, " leaves the ", described(*left->begin()), " over");
    }
  }

  const std::vector<StageSchedule>& schedule_;
  const SimulationCosts& costs_;
  int count_, chunks_ = 1, micro_batches_ = 0;
  bool forward_only_ = true;
  std::vector<Stage> stages_;
  std::map<std::pair<int, int>, Channel> channels_;
  std::vector<std::vector<Simulation::Span>> spans_;
  Simulation result_;
};

}  // namespace

Simulation simulate(const std::vector<StageSchedule>& schedule, const SimulationCosts& costs) {
  return Player(schedule, costs).run();
}

}  // namespace mcore_bridge
