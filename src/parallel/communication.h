// Counters behind mcore_bridge/communication.h: one atomic addition per operation.
#pragma once

#include <cstdint>
#include <optional>

#include "mcore_bridge/topology.h"

namespace mcore_bridge {

enum class Operation { kAllReduce, kAllGather, kReduceScatter, kAllToAll, kBroadcast, kSend, kReceive, kBarrier };

/// Adds one operation on `bytes` (see CommunicationVolume) within a group of `ranks`. `root`: of a broadcast.
void count_communication(std::optional<GroupKind> kind, Operation operation, int64_t bytes, int ranks,
                         bool root = false);

}  // namespace mcore_bridge
