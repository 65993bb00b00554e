// Threads for work that waits for disks: a list of tasks, taken in order by a few threads.
#pragma once

#include <cstddef>
#include <functional>

namespace mcore_bridge {

/// How many threads this process should read or write files with: MCB_IO_THREADS when set (1 to 1024), otherwise twice
/// the cores this process may use, shared with the other ranks of the node (LOCAL_WORLD_SIZE), between 2 and 16.
/// ValueError when the variable is no such number.
int io_threads();

/// Runs work(0, t) ... work(count - 1, t) on up to `threads` threads t = 0, 1, ..., which take the indices in order,
/// and returns when all are done. The first exception stops what has not begun and is rethrown here. `tick` is called
/// on the calling thread about every 100 ms while it waits, and once at the end; an exception of it stops the work
/// likewise.
void run_parallel(size_t count, int threads, const std::function<void(size_t index, int thread)>& work,
                  const std::function<void()>& tick = {});

}  // namespace mcore_bridge
