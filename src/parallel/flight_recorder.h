// The last collectives of every group: what a hang is explained with.
#pragma once

#include <c10/util/ArrayRef.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "parallel/communication.h"

namespace mcore_bridge {

/// One group's operations, in order. The n-th operation of a group is the same on all its ranks.
class FlightRecorder {
 public:
  /// A group of more than one rank; it is listed by flight_records() as long as it lives.
  static std::shared_ptr<FlightRecorder> create(std::optional<GroupKind> kind, std::vector<int> ranks);

  struct Entry {
    uint64_t number = 0;  ///< counts from 1
    Operation operation = Operation::kBarrier;
    std::string shape;
    std::chrono::steady_clock::time_point started;
    double seconds = -1;  ///< how long it took; negative while it is under way
  };
  uint64_t start(Operation operation, c10::IntArrayRef shape);
  void finish(uint64_t number);
  std::vector<Entry> entries() const;  ///< oldest first
  std::string description() const;     ///< "tp (ranks 0, 1)"
  const std::vector<int>& ranks() const { return ranks_; }
  std::string kind() const;

  /// start() on construction, finish() at the end of the scope unless an exception leaves it.
  class Scope {
   public:
    Scope(FlightRecorder& recorder, Operation operation, c10::IntArrayRef shape)
        : recorder_(recorder), number_(recorder.start(operation, shape)), exceptions_(std::uncaught_exceptions()) {}
    ~Scope() {
      if (std::uncaught_exceptions() == exceptions_) recorder_.finish(number_);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    FlightRecorder& recorder_;
    uint64_t number_;
    int exceptions_;
  };

 private:
  FlightRecorder(std::optional<GroupKind> kind, std::vector<int> ranks) : kind_(kind), ranks_(std::move(ranks)) {}
  static constexpr size_t kKept = 16;
  const std::optional<GroupKind> kind_;
  const std::vector<int> ranks_;
  mutable std::mutex mutex_;
  uint64_t count_ = 0;
  std::array<Entry, kKept> ring_;
};

const char* operation_name(Operation operation);

/// [{group, ranks, operations: [{number, operation, shape, age, seconds}]}] as JSON, of all living groups of this
/// process. `age`: seconds since it started; `seconds` is null while it is under way. Any thread.
std::string flight_records();

}  // namespace mcore_bridge
