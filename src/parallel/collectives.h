// Collectives that autograd sees through: each forward operation with its conjugate in backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "parallel/group.h"

namespace mcore_bridge {

at::Tensor copy_to_region(const at::Tensor& x, const Group& group);      ///< identity; backward all-reduces
at::Tensor reduce_from_region(const at::Tensor& x, const Group& group);  ///< all-reduce; backward identity
/// Sequence parallelism, dim 0: all-gather; backward reduce-scatters.
at::Tensor gather_sequence(const at::Tensor& x, const Group& group);
/// Sequence parallelism, dim 0: all-gather of something every member then uses alike; backward takes this member's
/// slice.
at::Tensor gather_sequence_replicated(const at::Tensor& x, const Group& group);
/// Sequence parallelism, dim 0: reduce-scatter; backward all-gathers.
at::Tensor reduce_scatter_sequence(const at::Tensor& x, const Group& group);
/// Sequence parallelism, dim 0: this member's slice; backward all-gathers.
at::Tensor scatter_sequence(const at::Tensor& x, const Group& group);
/// All-gather along the last dim; backward takes this member's slice.
at::Tensor gather_last_dim(const at::Tensor& x, const Group& group);

/// Rows (dim 0) sent in unequal parts, see Group::start_all_to_all; backward sends their gradients the way back.
/// `meanwhile` runs while they are under way, and so does its backward while their gradients are.
at::Tensor exchange_rows(const at::Tensor& x, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                         const Group& group, const std::function<void()>& meanwhile = {});

}  // namespace mcore_bridge
