#include "core/phase_timer.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <chrono>
#include <deque>
#include <optional>
#include <vector>

namespace mcore_bridge {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::array<const char*, 4> kNames = {"forward", "backward", "communication", "optimizer"};
constexpr int kNone = -1;
constexpr size_t kMostMarks = 1 << 16;  // nobody reads: forget

/// A moment from which on the time counts for `phase`.
struct Mark {
  int phase = kNone;
  Clock::time_point host;
  std::optional<c10::Event> device;
};

struct State {
  std::vector<int> open;
  std::deque<Mark> marks;
  std::array<double, kNames.size()> seconds{};
};

State& state() {
  static thread_local State own;
  return own;
}

void mark(int phase, c10::Device device) {
  auto& s = state();
  Mark mark{phase, Clock::now(), std::nullopt};
  if (!device.is_cpu()) {
    mark.device.emplace(device.type(), c10::EventFlag::BACKEND_DEFAULT);
    mark.device->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }
  if (s.marks.size() >= kMostMarks) s.marks.clear();
  s.marks.push_back(std::move(mark));
}

}  // namespace

TimedPhase::TimedPhase(Phase phase, c10::Device device) : device_(device) {
  state().open.push_back(static_cast<int>(phase));
  mark(static_cast<int>(phase), device_);
}

TimedPhase::~TimedPhase() {
  auto& open = state().open;
  open.pop_back();
  mark(open.empty() ? kNone : open.back(), device_);
}

std::map<std::string, double> take_phase_seconds() {
  auto& s = state();
  while (s.marks.size() > 1) {
    const auto &first = s.marks[0], &second = s.marks[1];
    double seconds = std::chrono::duration<double>(second.host - first.host).count();
    if (first.device && second.device) {
      if (!second.device->query()) break;
      seconds = first.device->elapsedTime(*second.device) / 1000;
    }
    if (first.phase != kNone) s.seconds[static_cast<size_t>(first.phase)] += seconds;
    s.marks.pop_front();
  }
  std::map<std::string, double> result;
  for (size_t i = 0; i < kNames.size(); ++i) result[kNames[i]] = s.seconds[i];
  s.seconds.fill(0);
  return result;
}

}  // namespace mcore_bridge
