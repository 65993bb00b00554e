#include "parallel/flight_recorder.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

namespace mcore_bridge {
namespace {

std::mutex registry_mutex;
std::vector<std::weak_ptr<FlightRecorder>>& registry() {
  static std::vector<std::weak_ptr<FlightRecorder>> recorders;
  return recorders;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

std::shared_ptr<FlightRecorder> FlightRecorder::create(std::optional<GroupKind> kind, std::vector<int> ranks) {
  std::shared_ptr<FlightRecorder> recorder(new FlightRecorder(kind, std::move(ranks)));
  const std::scoped_lock lock(registry_mutex);
  auto& all = registry();
  std::erase_if(all, [](const auto& known) { return known.expired(); });
  all.push_back(recorder);
  return recorder;
}

uint64_t FlightRecorder::start(Operation operation, c10::IntArrayRef shape) {
  std::ostringstream text;
  text << shape;
  const std::scoped_lock lock(mutex_);
  ring_[count_ % kKept] = {count_ + 1, operation, text.str(), std::chrono::steady_clock::now(), -1};
  return ++count_;
}

void FlightRecorder::finish(uint64_t number) {
  const std::scoped_lock lock(mutex_);
  auto& entry = ring_[(number - 1) % kKept];
  if (entry.number == number) entry.seconds = seconds_since(entry.started);
}

std::vector<FlightRecorder::Entry> FlightRecorder::entries() const {
  const std::scoped_lock lock(mutex_);
  std::vector<Entry> result;
  for (auto number = count_ > kKept ? count_ - kKept : 0; number < count_; ++number)
    result.push_back(ring_[number % kKept]);
  return result;
}

std::string FlightRecorder::kind() const { return kind_ ? group_name(*kind_) : "other"; }

std::string FlightRecorder::description() const {
  std::string text = kind() + " (ranks ";
  for (size_t i = 0; i < ranks_.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks_[i]);
  return text + ")";
}

std::string flight_records() {
  auto result = nlohmann::json::array();
  std::vector<std::shared_ptr<FlightRecorder>> living;
  {
    const std::scoped_lock lock(registry_mutex);
    for (const auto& known : registry()) {
      if (auto recorder = known.lock()) living.push_back(std::move(recorder));
    }
  }
  for (const auto& recorder : living) {
    auto operations = nlohmann::json::array();
    for (const auto& entry : recorder->entries()) {
      operations.push_back({{"number", entry.number},
                            {"operation", operation_name(entry.operation)},
                            {"shape", entry.shape},
                            {"age", seconds_since(entry.started)},
                            {"seconds", entry.seconds < 0 ? nlohmann::json() : nlohmann::json(entry.seconds)}});
    }
    if (!operations.empty())
      result.push_back({{"group", recorder->kind()}, {"ranks", recorder->ranks()}, {"operations", operations}});
  }
  return result.dump();
}

}  // namespace mcore_bridge
