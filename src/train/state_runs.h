// Which elements of a bucket's shard have masters and optimizer states. Pure arithmetic: the optimizer allocates by it,
// the planner counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mcore_bridge {

/// A parameter's place in a bucket.
struct StateSlot {
  int64_t offset = 0, elements = 0;
  int kind = 0;        ///< parameters of different kinds are updated differently
  bool whole = false;  ///< is not cut between device and host; alike for all slots of a kind
};

/// Elements [begin, end) of a bucket: consecutive parameters of one kind and the gaps that alignment leaves between
/// them.
struct StateRun {
  int64_t begin = 0, end = 0;
  size_t first = 0;      ///< the slot its kind begins with
  bool on_host = false;  ///< master and states are in host memory
};

/// The runs of the shard [begin, end); `slots` by offset. The first `to_offload` elements that may be cut go to the
/// host; it is lessened by those.
std::vector<StateRun> state_runs(const std::vector<StateSlot>& slots, int64_t begin, int64_t end, int64_t& to_offload);

/// Elements of shards of `elements` in all that optimizer_offload_fraction sends to the host.
int64_t offloaded_elements(double fraction, int64_t elements);

}  // namespace mcore_bridge
