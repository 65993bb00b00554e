// Communication as arithmetic: what collectives carry, without running them.
#pragma once

#include <array>
#include <cstdint>

namespace mcore_bridge {

/// Operations of one rank within one group. `bytes`: of the whole tensor an operation is about (the output of an
/// all-gather, the input of a reduce-scatter, a message); `wire_bytes`: what this rank puts on the
/// wire at least, 2 (n - 1) / n of `bytes` in an all-reduce, (n - 1) / n in the others, all of it in a send, nothing in
/// a receive.
struct Traffic {
  enum Kind { kAllReduce, kAllGather, kReduceScatter, kAllToAll, kSend, kReceive, kKinds };
  static const char* name(int kind) {
    constexpr const char* names[] = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "recv"};
    return names[kind];
  }
  struct Line {
    int64_t calls = 0, bytes = 0, wire_bytes = 0;
  };
  std::array<Line, kKinds> lines{};

  static Traffic of(Kind kind, int64_t bytes, int64_t ranks) {
    Traffic result;
    if (ranks == 1) return result;
    const auto passes = kind == kAllReduce ? 2 : 1;
    result.lines[kind] = {1, bytes, passes * bytes * (ranks - 1) / ranks};
    return result;
  }
  static Traffic all_reduce(int64_t bytes, int64_t ranks) { return of(kAllReduce, bytes, ranks); }
  static Traffic all_gather(int64_t whole_bytes, int64_t ranks) { return of(kAllGather, whole_bytes, ranks); }
  static Traffic reduce_scatter(int64_t whole_bytes, int64_t ranks) { return of(kReduceScatter, whole_bytes, ranks); }
  static Traffic all_to_all(int64_t bytes, int64_t ranks) { return of(kAllToAll, bytes, ranks); }
  /// One message to a neighbour and one of the same size from another.
  static Traffic exchange(int64_t bytes) {
    Traffic result;
    result.lines[kSend] = {1, bytes, bytes};
    result.lines[kReceive] = {1, bytes, 0};
    return result;
  }

  Traffic& operator+=(const Traffic& other) {
    for (int kind = 0; kind < kKinds; ++kind) {
      lines[kind].calls += other.lines[kind].calls;
      lines[kind].bytes += other.lines[kind].bytes;
      lines[kind].wire_bytes += other.lines[kind].wire_bytes;
    }
    return *this;
  }
  Traffic operator*(int64_t times) const {
    auto result = *this;
    for (auto& line : result.lines) line = {line.calls * times, line.bytes * times, line.wire_bytes * times};
    return result;
  }
};

}  // namespace mcore_bridge
