#include "mcore_bridge/schedule.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using Kind = Action::Kind;
using Message = Action::Message;

/// Writes one stage's row; messages given one after the other with `exchange` start together.
class Row {
 public:
  Row(int stage, int stages) : stage_(stage), last_(stages - 1) {}

  void forward(int micro_batch) {
    actions_.push_back({.kind = Kind::kForward, .chunk = 0, .micro_batch = micro_batch, .messages = {}});
  }
  void backward(int micro_batch) {
    actions_.push_back({.kind = Kind::kBackward, .chunk = 0, .micro_batch = micro_batch, .messages = {}});
  }

  // An activation is named by the chunk that produced it, its gradient likewise.
  std::vector<Message> receive_forward(int batch) const {
    return stage_ > 0 ? list({false, false, stage_ - 1, batch, stage_ - 1}) : none();
  }
  std::vector<Message> send_forward(int batch) const {
    return stage_ < last_ ? list({true, false, stage_, batch, stage_ + 1}) : none();
  }
  std::vector<Message> receive_backward(int batch) const {
    return stage_ < last_ ? list({false, true, stage_, batch, stage_ + 1}) : none();
  }
  std::vector<Message> send_backward(int batch) const {
    return stage_ > 0 ? list({true, true, stage_ - 1, batch, stage_ - 1}) : none();
  }

  void exchange(std::vector<Message> first, const std::vector<Message>& second = {}) {
    first.insert(first.end(), second.begin(), second.end());
    if (!first.empty())
      actions_.push_back({.kind = Kind::kExchange, .chunk = 0, .micro_batch = 0, .messages = std::move(first)});
  }
  StageSchedule take() { return std::move(actions_); }

 private:
  static std::vector<Message> list(Message message) { return {message}; }
  static std::vector<Message> none() { return {}; }
  int stage_, last_;
  StageSchedule actions_;
};

}  // namespace

std::vector<StageSchedule> one_forward_one_backward(int stages, int micro_batches) {
  MCB_CHECK(stages > 0 && micro_batches > 0, "schedule: ", stages, " stages and ", micro_batches,
            " micro-batches must both be at least 1");
  std::vector<StageSchedule> result;
  for (int stage = 0; stage < stages; ++stage) {
    Row row(stage, stages);
    const int warm_up = std::min(micro_batches, stages - 1 - stage), steady = micro_batches - warm_up;
    for (int batch = 0; batch < warm_up; ++batch) {
      row.exchange(row.receive_forward(batch));
      row.forward(batch);
      row.exchange(row.send_forward(batch));
    }
    if (steady > 0) row.exchange(row.receive_forward(warm_up));
    for (int i = 0; i < steady; ++i) {
      row.forward(warm_up + i);
      row.exchange(row.send_forward(warm_up + i), row.receive_backward(i));
      row.backward(i);
      row.exchange(row.send_backward(i),
                   i + 1 < steady ? row.receive_forward(warm_up + i + 1) : std::vector<Message>{});
    }
    for (int batch = steady; batch < micro_batches; ++batch) {
      row.exchange(row.receive_backward(batch));
      row.backward(batch);
      row.exchange(row.send_backward(batch));
    }
    result.push_back(row.take());
  }
  return result;
}

Simulation simulate(const std::vector<StageSchedule>& schedule, int micro_batches, double backward_cost) {
  const int stages = static_cast<int>(schedule.size());
  using Key = std::tuple<bool, int, int>;         // gradient, chunk, micro-batch
  std::map<std::pair<int, Key>, double> arrived;  // (receiver, what) -> time
  std::vector<size_t> next(stages, 0);
  std::vector<double> clock(stages, 0), busy(stages, 0);
  std::vector<int> live(stages, 0);
  std::vector<size_t> posted(stages, 0);  // exchanges whose sends have started
  Simulation result{0, std::vector<int>(stages, 0)};
  std::vector<std::vector<bool>> forwarded(stages, std::vector<bool>(micro_batches)), reversed = forwarded;

  bool progress = true;
  while (progress) {
    progress = false;
    for (int stage = 0; stage < stages; ++stage) {
      while (next[stage] < schedule[stage].size()) {
        const auto& action = schedule[stage][next[stage]];
        if (action.kind == Kind::kExchange) {
          if (posted[stage] <= next[stage]) {
            for (const auto& message : action.messages) {
              if (message.send)
                arrived[{message.peer, {message.gradient, message.chunk, message.micro_batch}}] = clock[stage];
            }
            posted[stage] = next[stage] + 1;
            progress = true;
          }
          bool all = true;
          double time = clock[stage];
          for (const auto& message : action.messages) {
            if (message.send) continue;
            const auto found = arrived.find({stage, {message.gradient, message.chunk, message.micro_batch}});
            all = all && found != arrived.end();
            if (found != arrived.end()) time = std::max(time, found->second);
          }
          if (!all) break;
          clock[stage] = time;
        } else {
          const bool forward = action.kind == Kind::kForward;
          auto& done = forward ? forwarded : reversed;
          MCB_CHECK(action.micro_batch >= 0 && action.micro_batch < micro_batches && !done[stage][action.micro_batch],
                    "schedule: stage ", stage, " repeats or invents micro-batch ", action.micro_batch);
          MCB_CHECK(forward || forwarded[stage][action.micro_batch], "schedule: stage ", stage,
                    " reverses micro-batch ", action.micro_batch, " before its forward");
          done[stage][action.micro_batch] = true;
          const double cost = forward ? 1.0 : backward_cost;
          clock[stage] += cost;
          busy[stage] += cost;
          live[stage] += forward ? 1 : -1;
          result.peak_activations[stage] = std::max(result.peak_activations[stage], live[stage]);
        }
        ++next[stage];
        progress = true;
      }
    }
  }
  double end = 0, work = 0;
  for (int stage = 0; stage < stages; ++stage) {
    MCB_CHECK(next[stage] == schedule[stage].size(), "schedule: deadlock, stage ", stage, " waits in action ",
              next[stage]);
    for (int batch = 0; batch < micro_batches; ++batch) {
      MCB_CHECK(forwarded[stage][batch] && reversed[stage][batch], "schedule: stage ", stage,
                " never finishes micro-batch ", batch);
    }
    end = std::max(end, clock[stage]);
    work += busy[stage];
  }
  result.bubble_fraction = end > 0 ? 1 - work / (end * stages) : 0;
  return result;
}

}  // namespace mcore_bridge
