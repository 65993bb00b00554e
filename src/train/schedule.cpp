// Each schedule is an order of computations per stage; the messages follow from it.
#include "mcore_bridge/schedule.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using Kind = Action::Kind;
using Message = Action::Message;
using Orders = std::vector<std::vector<Action>>;  // by stage, computations only

void check_sizes(int stages, int chunks, int micro_batches) {
  MCB_CHECK(stages > 0 && chunks > 0 && micro_batches > 0, "schedule: ", stages, " stages, ", chunks, " chunks and ",
            micro_batches, " micro-batches must all be at least 1");
  MCB_CHECK(chunks == 1 || stages > 1, "schedule: ", chunks, " chunks per stage need more than one stage");
}

Action compute(Kind kind, int chunk, int micro_batch) {
  return {.kind = kind, .chunk = chunk, .micro_batch = micro_batch, .messages = {}};
}

/// What one stage receives for a computation and sends after it.
class Neighbours {
 public:
  Neighbours(int stage, int stages, int chunks) : stage_(stage), stages_(stages), last_(stages * chunks - 1) {}

  std::optional<Message> receive(const Action& action) const {
    const int global = action.chunk * stages_ + stage_;
    if (action.kind == Kind::kForward && global > 0)
      return Message{false, false, global - 1, action.micro_batch, previous()};
    if (reverses(action) && global < last_) return Message{false, true, global, action.micro_batch, next()};
    return std::nullopt;
  }
  std::optional<Message> send(const Action& action) const {
    const int global = action.chunk * stages_ + stage_;
    if (action.kind == Kind::kForward && global < last_)
      return Message{true, false, global, action.micro_batch, next()};
    if (reverses(action) && global > 0) return Message{true, true, global - 1, action.micro_batch, previous()};
    return std::nullopt;
  }

 private:
  static bool reverses(const Action& action) {
    return action.kind == Kind::kBackward || action.kind == Kind::kBackwardInput;
  }
  int previous() const { return (stage_ + stages_ - 1) % stages_; }
  int next() const { return (stage_ + 1) % stages_; }
  int stage_, stages_, last_;
};

/// Before which computation of its row a send is waited for, by stage and message; missing: after the last one.
using Releases = std::map<std::pair<int, Message>, size_t>;

/// What each stage sends to each other one, in order, as the receiver sees it.
std::map<std::pair<int, int>, std::vector<Message>> message_order(const Orders& orders, int chunks) {
  const int stages = static_cast<int>(orders.size());
  std::map<std::pair<int, int>, std::vector<Message>> channels;
  for (int stage = 0; stage < stages; ++stage) {
    const Neighbours neighbours(stage, stages, chunks);
    for (const auto& action : orders[stage]) {
      const auto sent = neighbours.send(action);
      if (sent) channels[{stage, sent->peer}].push_back({false, sent->gradient, sent->chunk, sent->micro_batch, stage});
    }
  }
  return channels;
}

std::vector<StageSchedule> place_messages(const Orders& orders, int chunks, const Releases& releases) {
  const int stages = static_cast<int>(orders.size());
  const auto channels = message_order(orders, chunks);
  std::vector<StageSchedule> result;
  for (int stage = 0; stage < stages; ++stage) {
    const Neighbours neighbours(stage, stages, chunks);
    const auto& order = orders[stage];
    std::map<int, size_t> started;                     // receives, by peer
    std::map<size_t, std::vector<Message>> releasing;  // sends, by the computation before which they are waited for
    StageSchedule row;
    auto add = [&](Kind kind, std::vector<Message> messages) {
      if (!messages.empty())
        row.push_back({.kind = kind, .chunk = 0, .micro_batch = 0, .messages = std::move(messages)});
    };
    for (size_t i = 0; i <= order.size(); ++i) {
      std::vector<Message> start;
      if (const auto sent = i > 0 ? neighbours.send(order[i - 1]) : std::nullopt) {
        start.push_back(*sent);
        const auto release = releases.find({stage, *sent});
        releasing[release == releases.end() ? order.size() : release->second].push_back(*sent);
      }
      for (size_t ahead = i; ahead < std::min(i + 2, order.size()); ++ahead) {
        const auto wanted = neighbours.receive(order[ahead]);
        if (!wanted) continue;
        // All that come before it on the same way are started with it, whoever they are for.
        const auto& channel = channels.at({wanted->peer, stage});
        const auto place = static_cast<size_t>(
            std::find(channel.begin() + started[wanted->peer], channel.end(), *wanted) - channel.begin());
        if (place == channel.size()) continue;  // started already
        for (auto& next = started[wanted->peer]; next <= place; ++next) start.push_back(channel[next]);
      }
      auto wait = std::move(releasing[i]);
      if (i < order.size()) {
        if (const auto wanted = neighbours.receive(order[i])) wait.push_back(*wanted);
      }
      add(Kind::kStart, std::move(start));
      add(Kind::kWait, std::move(wait));
      if (i < order.size()) row.push_back(order[i]);
    }
    result.push_back(std::move(row));
  }
  return result;
}

/// Puts messages between the computations, as the contract of StageSchedule says. A send is waited for where it has
/// moved already when every computation takes equally long, so that waiting costs nothing there; as those waits look
/// back in time, they cannot deadlock.
std::vector<StageSchedule> with_messages(const Orders& orders, int chunks) {
  const auto played = simulate(place_messages(orders, chunks, {}));
  std::vector<std::vector<double>> starts(orders.size());
  for (const auto& span : played.spans) starts[span.stage].push_back(span.start);
  Releases releases;
  for (const auto& transfer : played.transfers) {
    const auto& times = starts[transfer.from];
    const Message message{true, transfer.gradient, transfer.chunk, transfer.micro_batch, transfer.to};
    // Not before the computation that follows the one it was started after.
    const auto sent = std::lower_bound(times.begin(), times.end(), transfer.sent);
    const auto moved = std::lower_bound(sent, times.end(), transfer.moved);
    const auto place = std::max(sent + (sent == times.end() ? 0 : 1), moved);
    releases[{transfer.from, message}] = static_cast<size_t>(std::min(place, times.end()) - times.begin());
  }
  return place_messages(orders, chunks, releases);
}

/// How many micro-batches a chunk takes before the next chunk's turn, group by group.
std::vector<int> micro_batch_groups(int stages, int micro_batches, int group_size) {
  if (group_size == 0) group_size = stages;
  MCB_CHECK(group_size >= stages, "schedule: groups of ", group_size, " micro-batches are smaller than the ", stages,
            " stages");
  if (micro_batches < group_size) return {micro_batches};
  const int count = micro_batches / group_size, rest = micro_batches % group_size;
  std::vector<int> groups(count, group_size);
  if (rest >= stages) {
    groups.push_back(rest);
  } else {
    for (int i = 0; i < rest; ++i) ++groups[i % count];
  }
  return groups;
}

/// (chunk, micro-batch) in the order of forwards; with `reverse` of backwards.
std::vector<std::pair<int, int>> virtual_order(const std::vector<int>& groups, int chunks, bool reverse) {
  std::vector<std::pair<int, int>> result;
  int first = 0;
  for (const int size : groups) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      for (int i = 0; i < size; ++i) result.emplace_back(reverse ? chunks - 1 - chunk : chunk, first + i);
    }
    first += size;
  }
  return result;
}

Orders order_1f1b(int stages, int micro_batches) {
  check_sizes(stages, 1, micro_batches);
  Orders orders(stages);
  for (int stage = 0; stage < stages; ++stage) {
    auto& order = orders[stage];
    const int warm_up = std::min(micro_batches, stages - 1 - stage);
    for (int batch = 0; batch < warm_up; ++batch) order.push_back(compute(Kind::kForward, 0, batch));
    for (int batch = 0; batch < micro_batches; ++batch) {
      if (warm_up + batch < micro_batches) order.push_back(compute(Kind::kForward, 0, warm_up + batch));
      order.push_back(compute(Kind::kBackward, 0, batch));
    }
  }
  return orders;
}

Orders order_interleaved(int stages, int chunks, int micro_batches, int group_size) {
  check_sizes(stages, chunks, micro_batches);
  const auto groups = micro_batch_groups(stages, micro_batches, group_size);
  const auto forwards = virtual_order(groups, chunks, false), backwards = virtual_order(groups, chunks, true);
  const int total = static_cast<int>(forwards.size()), largest = *std::max_element(groups.begin(), groups.end());
  Orders orders(stages);
  for (int stage = 0; stage < stages; ++stage) {
    auto& order = orders[stage];
    // The last chunk's first forward comes after the other chunks' groups; two more per stage on the way there and
    // back.
    const int warm_up = std::min(total, (chunks - 1) * largest + 2 * (stages - 1 - stage));
    for (int i = 0; i < warm_up; ++i) order.push_back(compute(Kind::kForward, forwards[i].first, forwards[i].second));
    for (int i = 0; i < total; ++i) {
      if (warm_up + i < total) {
        const auto [chunk, batch] = forwards[warm_up + i];
        order.push_back(compute(Kind::kForward, chunk, batch));
      }
      order.push_back(compute(Kind::kBackward, backwards[i].first, backwards[i].second));
    }
  }
  return orders;
}

Orders order_zero_bubble_h1(int stages, int micro_batches) {
  check_sizes(stages, 1, micro_batches);
  // All stages in step, every computation taking one step: forwards and backwards on inputs in the order of 1F1B,
  // weight gradients while waiting for others and where no more than `stages` micro-batches would live otherwise.
  struct Count {
    int forward = 0, input = 0, weight = 0;
  };
  std::vector<Count> done(stages);
  Orders orders(stages);
  for (int finished = 0; finished < stages;) {
    const auto before = done;
    finished = 0;
    for (int stage = 0; stage < stages; ++stage) {
      auto& now = done[stage];
      const bool arrived = stage == 0 || before[stage - 1].forward > now.forward;
      const bool reversed = stage == stages - 1 || before[stage + 1].input > now.input;
      const bool forward = now.forward < micro_batches && now.forward - now.input < stages - stage;
      const bool full = now.forward - now.weight == stages;
      if (forward && arrived && !full) {
        orders[stage].push_back(compute(Kind::kForward, 0, now.forward++));
      } else if (!forward && reversed && now.input < micro_batches) {
        orders[stage].push_back(compute(Kind::kBackwardInput, 0, now.input++));
      } else if (now.weight < now.input) {
        orders[stage].push_back(compute(Kind::kBackwardWeight, 0, now.weight++));
      }
      finished += now.weight == micro_batches ? 1 : 0;
    }
  }
  return orders;
}

Orders order_of(const ScheduleOptions& options) {
  const auto& [name, stages, chunks, micro_batches, group_size] = options;
  if (name == "zb-h1") {
    MCB_CHECK(chunks == 1, "schedule: zb-h1 has one chunk per stage, found ", chunks);
    return order_zero_bubble_h1(stages, micro_batches);
  }
  MCB_CHECK(name == "1f1b" || name == "interleaved", "schedule: '", name, "' is not one of 1f1b, interleaved, zb-h1");
  return chunks == 1 ? order_1f1b(stages, micro_batches) : order_interleaved(stages, chunks, micro_batches, group_size);
}

}  // namespace

std::vector<StageSchedule> one_forward_one_backward(int stages, int micro_batches) {
  return with_messages(order_1f1b(stages, micro_batches), 1);
}

std::vector<StageSchedule> interleaved(int stages, int chunks, int micro_batches, int group_size) {
  return with_messages(order_interleaved(stages, chunks, micro_batches, group_size), chunks);
}

std::vector<StageSchedule> zero_bubble_h1(int stages, int micro_batches) {
  return with_messages(order_zero_bubble_h1(stages, micro_batches), 1);
}

std::vector<StageSchedule> forward_only(int stages, int chunks, int micro_batches, int group_size) {
  check_sizes(stages, chunks, micro_batches);
  std::vector<Action> order;
  for (const auto& [chunk, batch] : virtual_order(micro_batch_groups(stages, micro_batches, group_size), chunks, false))
    order.push_back(compute(Kind::kForward, chunk, batch));
  return with_messages(Orders(stages, order), chunks);
}

std::vector<StageSchedule> make_schedule(const ScheduleOptions& options) {
  return with_messages(order_of(options), options.chunks);
}

std::vector<StageSchedule> schedule_order(const ScheduleOptions& options) { return order_of(options); }

}  // namespace mcore_bridge
