// The fused query-key-value row taken apart, as one autograd node.
#pragma once

#include "kernels/split_qkv.h"

namespace mcore_bridge {

/// q and k normalised (when weights are given) and rotated (when tables are), v as it is: see kernels/split_qkv.h.
Qkv split_qkv(const at::Tensor& mixed_sbh, const SplitQkvOptions& options);

}  // namespace mcore_bridge
