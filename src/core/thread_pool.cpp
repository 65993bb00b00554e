#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// A positive number in an environment variable; 0 when it is unset.
int number_in(const char* name, int most) {
  const char* text = std::getenv(name);
  if (!text || !*text) return 0;
  int value = 0;
  const auto* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  MCB_CHECK(error == std::errc() && stop == end && value >= 1 && value <= most, name, ": '", text,
            "' is no number from 1 to ", most);
  return value;
}

/// Cores this process may run on, which a container or taskset can make fewer than the machine's.
int usable_cores() {
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

int io_threads() {
  if (const int chosen = number_in("MCB_IO_THREADS", 1024)) return chosen;
  const int ranks = std::max(1, number_in("LOCAL_WORLD_SIZE", 1 << 20));
  return std::clamp(2 * usable_cores() / ranks, 2, 16);
}

void run_parallel(size_t count, int threads, const std::function<void(size_t index, int thread)>& work,
                  const std::function<void()>& tick) {
  const auto workers = std::min(count, static_cast<size_t>(std::max(1, threads)));
  std::atomic<size_t> next = 0;
  std::atomic<bool> stop = false;
  std::mutex mutex;
  std::condition_variable finished;
  size_t running = workers;
  std::exception_ptr failure;
  auto record = [&] {
    stop = true;
    const std::scoped_lock lock(mutex);
    if (!failure) failure = std::current_exception();
  };
  auto loop = [&](int thread) {
    try {
      for (size_t index = next++; index < count && !stop; index = next++) work(index, thread);
    } catch (...) {
      record();
    }
    const std::scoped_lock lock(mutex);
    if (--running == 0) finished.notify_all();
  };

  std::vector<std::thread> pool;
  try {
    while (pool.size() < workers) pool.emplace_back(loop, static_cast<int>(pool.size()));
  } catch (...) {  // no more threads to be had: those there are do the work, or there is none
    const std::scoped_lock lock(mutex);
    running -= workers - pool.size();
    if (pool.empty() && !failure) failure = std::current_exception();
  }
  while (true) {
    {
      std::unique_lock lock(mutex);
      if (finished.wait_for(lock, std::chrono::milliseconds(100), [&] { return running == 0; })) break;
    }
    if (!tick || stop) continue;
    try {
      tick();
    } catch (...) {
      record();
    }
  }
  for (auto& thread : pool) thread.join();
  if (failure) std::rethrow_exception(failure);
  if (tick) tick();
}

}  // namespace mcore_bridge
