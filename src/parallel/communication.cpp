#include "parallel/communication.h"

#include <array>
#include <atomic>

#include "mcore_bridge/communication.h"
#include "parallel/flight_recorder.h"

namespace mcore_bridge {
namespace {

constexpr const char* kOperations[] = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all",
                                       "broadcast",  "send",       "recv",           "barrier"};
constexpr size_t kKinds = static_cast<size_t>(GroupKind::kWorld) + 2;  // and "other"

// Backward may run on another thread than forward.
struct Counter {
  std::atomic<int64_t> calls{0}, bytes{0}, wire_bytes{0};
  std::atomic<int> ranks{1};
};
std::array<std::array<Counter, std::size(kOperations)>, kKinds> counters;

int64_t wire_bytes(Operation operation, int64_t bytes, int ranks, bool root) {
  const auto others = bytes * (ranks - 1) / ranks;
  switch (operation) {
    case Operation::kAllReduce:
      return 2 * bytes * (ranks - 1) / ranks;
    case Operation::kAllGather:
    case Operation::kReduceScatter:
    case Operation::kAllToAll:
      return others;
    case Operation::kBroadcast:
      return root ? bytes : 0;
    case Operation::kSend:
      return bytes;
    default:
      return 0;
  }
}

}  // namespace

const char* operation_name(Operation operation) { return kOperations[static_cast<size_t>(operation)]; }

void count_communication(std::optional<GroupKind> kind, Operation operation, int64_t bytes, int ranks, bool root) {
  auto& counter = counters[kind ? static_cast<size_t>(*kind) : kKinds - 1][static_cast<size_t>(operation)];
  counter.calls.fetch_add(1, std::memory_order_relaxed);
  counter.bytes.fetch_add(bytes, std::memory_order_relaxed);
  counter.wire_bytes.fetch_add(wire_bytes(operation, bytes, ranks, root), std::memory_order_relaxed);
  if (counter.ranks.load(std::memory_order_relaxed) < ranks) counter.ranks.store(ranks, std::memory_order_relaxed);
}

CommunicationVolume communication_volume() {
  CommunicationVolume result;
  for (size_t kind = 0; kind < kKinds; ++kind) {
    const std::string name = kind + 1 < kKinds ? group_name(static_cast<GroupKind>(kind)) : "other";
    for (size_t operation = 0; operation < std::size(kOperations); ++operation) {
      const auto& counter = counters[kind][operation];
      if (counter.calls == 0) continue;
      result[name][kOperations[operation]] = {counter.calls, counter.bytes, counter.wire_bytes, counter.ranks};
    }
  }
  return result;
}

void reset_communication_volume() {
  for (auto& kind : counters) {
    for (auto& counter : kind) {
      counter.calls = 0;
      counter.bytes = 0;
      counter.wire_bytes = 0;
      counter.ranks = 1;
    }
  }
}

}  // namespace mcore_bridge
