// Work that may fail on one rank and must then fail on all of them.
#pragma once

#include <functional>

#include "parallel/group.h"

namespace mcore_bridge {

/// Runs `work` on every rank of `group`, then agrees: when it threw anywhere, every rank throws the error of the first
/// rank that failed. Collective (one small reduction of host tensors when all is well; the groups of a GPU run carry
/// both backends).
void together(const Group& group, const std::function<void()>& work);

/// A random number, not 0, the same on all ranks: what tells this attempt from those of other processes. Collective.
int64_t common_token(const Group& group);

}  // namespace mcore_bridge
