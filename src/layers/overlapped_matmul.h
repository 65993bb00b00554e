// Sequence-parallel exchanges pipelined with the matrix products beside them, around a ring (tp_comm_overlap).
//
// Matrices of rows: a rank's shard is [m / tp, k], block i of the whole [m, k] being rank i's.
#pragma once

#include <ATen/core/Tensor.h>

#include "parallel/group.h"

namespace mcore_bridge {

/// all_gather(x) w^T + bias: each block is multiplied while the next is on its way. x [m / tp, k], w [n, k], bias [n]
/// or undefined -> [m, n]. `gathered` (when given) receives all_gather(x) [m, k]. No gradients.
at::Tensor gather_matmul(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias, const Group& group,
                         at::Tensor* gathered = nullptr);

/// reduce_scatter(x w^T + addend): the sum of a block travels towards its rank, each rank adding its product on the
/// way. x [m, k], w [n, k], addend [m, n] or undefined -> [m / tp, n]. `beside`, when given, is gathered meanwhile into
/// `gathered`. No gradients.
at::Tensor matmul_reduce_scatter(const at::Tensor& x, const at::Tensor& w, const at::Tensor& addend, const Group& group,
                                 const at::Tensor& beside = {}, at::Tensor* gathered = nullptr);

}  // namespace mcore_bridge
