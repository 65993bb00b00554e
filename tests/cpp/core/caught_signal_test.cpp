#include "core/caught_signal.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

namespace mcore_bridge {
namespace {

/// How a child that runs `body` ended: its exit code, or minus the signal that ended it.
template <class Body>
int ending_of(const Body& body) {
  const auto child = fork();
  if (child == 0) {
    body();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

TEST(CaughtSignal, TheFirstLeavesANoteTheSecondTermEnds) {
  EXPECT_EQ(ending_of([] {
              watch_signals({SIGTERM, SIGUSR1});
              if (caught_signal() != 0) _exit(1);
              raise(SIGUSR1);
              raise(SIGUSR1);
              raise(SIGTERM);
              if (caught_signal() != SIGUSR1) _exit(2);
              watch_signals({SIGTERM});
              raise(SIGTERM);
              _exit(caught_signal() == SIGTERM ? 7 : 3);
            }),
            7);
  EXPECT_EQ(ending_of([] {
              watch_signals({SIGTERM});
              raise(SIGTERM);
              raise(SIGTERM);
            }),
            -SIGTERM);
}

TEST(CaughtSignal, ChildrenAndWhatWasBefore) {
  EXPECT_EQ(ending_of([] {
              watch_signals({SIGUSR1});
              _exit(ending_of([] { raise(SIGUSR1); }) == -SIGUSR1 ? 7 : 1);
            }),
            7);
  EXPECT_EQ(ending_of([] {
              watch_signals({SIGTERM});
              raise(SIGTERM);
              unwatch_signals();
              if (caught_signal() != SIGTERM) _exit(1);
              raise(SIGTERM);
            }),
            -SIGTERM);
}

}  // namespace
}  // namespace mcore_bridge
