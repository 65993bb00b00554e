// Softmax cross-entropy of a block of rows of logits, in fp32 (float64 for float64). No autograd, no communication: the
// caller joins the statistics of vocabulary shards.
#pragma once

#include <ATen/core/Tensor.h>

namespace mcore_bridge {

/// Which columns of the whole vocabulary the block holds.
struct VocabColumns {
  int64_t first = 0;  ///< of the whole vocabulary
  int64_t count = 0;  ///< real ones; the block may have more columns, which are padding
};

/// One per row each.
struct SoftmaxStatistics {
  at::Tensor maximum;
  at::Tensor sum;     ///< of exp(logit - maximum)
  at::Tensor target;  ///< the label's logit, 0 when another rank holds it or there is none
};

/// `logits` [rows, columns], `labels` int64 [rows], -100: no loss.
SoftmaxStatistics softmax_statistics(const at::Tensor& logits, const at::Tensor& labels, VocabColumns columns);

/// logits <- (softmax - one-hot(label)) * weight, in place; rows without loss and padding columns become 0.
/// `weight`: [rows], or a float64 scalar for all rows; on the logits' device, so that the host need not know it.
void softmax_gradient_(const at::Tensor& logits, const at::Tensor& labels, VocabColumns columns,
                       const SoftmaxStatistics& statistics, const at::Tensor& weight);

/// Both, for a block that holds the whole vocabulary.
SoftmaxStatistics softmax_statistics_and_gradient_(const at::Tensor& logits, const at::Tensor& labels,
                                                   VocabColumns columns, const at::Tensor& weight);

}  // namespace mcore_bridge
