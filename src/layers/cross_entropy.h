// Cross entropy over a vocabulary that is split over the tensor-parallel ranks.
#pragma once

#include <ATen/core/Tensor.h>

#include "layers/footprint.h"
#include "parallel/group.h"

namespace mcore_bridge {

/// Per-token loss, fp32 [s, b]. `logits_sbv`: this rank's columns [s, b, local], of which those from `vocab_size` on
/// (counted over all ranks) are padding; `labels_sb`: int64, -100 gives loss 0 and no gradient. Sums run in fp32.
at::Tensor vocab_parallel_cross_entropy(const at::Tensor& logits_sbv, const at::Tensor& labels_sb, int64_t vocab_size,
                                        const Group& group);

struct LinearCrossEntropyOptions {
  int64_t vocab_size = 0;  ///< over all ranks; columns from there on are padding
  bool sequence_parallel = false;
  at::Tensor loss_weight;  ///< what each token's loss counts: float64 scalar on the device
};

/// The sum of loss_weight * loss over all tokens for logits = x W^T, a float64 scalar. Works through chunks of rows and
/// makes the gradients of x and W on the way (W's into its main gradient, if there is one), so that the logits never
/// exist; the gradient that backward is given is taken to be 1. `x_sbh` [s', b, h]; `weight` [local
/// vocabulary, h]; `labels_sb` as above.
at::Tensor linear_cross_entropy(const at::Tensor& x_sbh, const at::Tensor& weight, const at::Tensor& labels_sb,
                                const LinearCrossEntropyOptions& options, const Group& group);

/// Of the logits' part of either: `columns` of this rank, padding included. vocab_parallel_cross_entropy keeps the
/// logits; linear_cross_entropy (shape.training_loss) has a chunk of them at a time, `workspace` counts those of
/// forward.
Footprint cross_entropy_footprint(int64_t columns, int tp, const ActivationShape& shape);

}  // namespace mcore_bridge
