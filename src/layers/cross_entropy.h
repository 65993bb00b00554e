// Cross entropy over a vocabulary that is split over the tensor-parallel ranks; the whole logits never exist.
#pragma once

#include <ATen/core/Tensor.h>

#include "parallel/group.h"

namespace mcore_bridge {

/// Per-token loss, fp32 [s, b]. `logits_sbv`: this rank's columns [s, b, local], of which those from `vocab_size` on
/// (counted over all ranks) are padding; `labels_sb`: int64, -100 gives loss 0 and no gradient. Sums run in fp32.
at::Tensor vocab_parallel_cross_entropy(const at::Tensor& logits_sbv, const at::Tensor& labels_sb, int64_t vocab_size,
                                        const Group& group);

}  // namespace mcore_bridge
