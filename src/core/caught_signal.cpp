#include "core/caught_signal.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

std::atomic<int> caught{0};
std::atomic<pid_t> watching{0};
static_assert(std::atomic<int>::is_always_lock_free);

std::vector<std::pair<int, struct sigaction>>& before() {
  static std::vector<std::pair<int, struct sigaction>> actions;
  return actions;
}

// Only what POSIX allows in a handler.
void note(int number) {
  if (getpid() != watching.load()) {
    signal(number, SIG_DFL);
    raise(number);
    return;
  }
  int none = 0;
  caught.compare_exchange_strong(none, number);
}

}  // namespace

void watch_signals(const std::vector<int>& numbers) {
  unwatch_signals();
  caught = 0;
  watching = getpid();
  for (const int number : numbers) {
    struct sigaction action {
    }, old{};
    action.sa_handler = note;
    action.sa_flags = SA_RESTART | (number == SIGTERM ? SA_RESETHAND : 0);
    MCB_CHECK(sigaction(number, &action, &old) == 0, "watch_signals: signal ", number, ": ", std::strerror(errno));
    before().emplace_back(number, old);
  }
}

void unwatch_signals() {
  for (const auto& [number, action] : before()) sigaction(number, &action, nullptr);
  before().clear();
}

int caught_signal() { return caught.load(); }

}  // namespace mcore_bridge
