// Work that may fail on one rank and must then fail on all of them.
#pragma once

#include <c10/core/Device.h>

#include <functional>

#include "parallel/group.h"

namespace mcore_bridge {

/// Runs `work` on every rank of `group`, then agrees: when it threw anywhere, every rank throws the error of the first rank
/// that failed. Collective (one small reduction when all is well). `device`: where the group's backend wants its tensors.
void together(const Group& group, c10::Device device, const std::function<void()>& work);

}  // namespace mcore_bridge
