// Signals that ask a run to end well. They must be seen while the main thread is in the engine, where Python's handlers
// do not run.
#pragma once

#include <vector>

namespace mcore_bridge {

/// From now on these signals only leave a note: caught_signal(). The second SIGTERM ends the process as it would have
/// before: even while it waits in a collective. Forked children are ended by the first. Replaces an earlier watch.
void watch_signals(const std::vector<int>& numbers);
/// The handlers are what they were before watch_signals().
void unwatch_signals();
/// The first signal since watch_signals(), 0 for none. Any thread; stays after unwatch_signals().
int caught_signal();

}  // namespace mcore_bridge
