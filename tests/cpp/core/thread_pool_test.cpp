#include "core/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "mcore_bridge/error.h"

namespace mcore_bridge {

TEST(ThreadPoolTest, EveryTaskRunsOnce) {
  std::vector<std::atomic<int>> runs(1000);
  int ticks = 0;
  run_parallel(runs.size(), 7, [&](size_t i, int thread) { runs[i] += thread < 7 ? 1 : 100; }, [&] { ++ticks; });
  for (const auto& count : runs) EXPECT_EQ(count, 1);
  EXPECT_GE(ticks, 1);
  run_parallel(0, 4, [](size_t, int) { FAIL(); });
}

TEST(ThreadPoolTest, TheFirstErrorStopsTheRest) {
  std::atomic<int> runs = 0;
  auto work = [&](size_t i, int) {
    ++runs;
    if (i == 3) throw std::runtime_error("three");
  };
  EXPECT_THROW(run_parallel(1'000'000, 4, work), std::runtime_error);
  EXPECT_LT(runs, 1'000'000);
}

TEST(ThreadPoolTest, ThreadsCanBeChosen) {
  ::setenv("MCB_IO_THREADS", "5", 1);
  EXPECT_EQ(io_threads(), 5);
  for (const char* wrong : {"0", "-1", "many", "3x"}) {
    ::setenv("MCB_IO_THREADS", wrong, 1);
    EXPECT_THROW(io_threads(), ValueError) << wrong;
  }
  ::unsetenv("MCB_IO_THREADS");
  EXPECT_GE(io_threads(), 2);
}

}  // namespace mcore_bridge
