// Matrices whose rows have memory of their own behind them: a second factor written there joins the first in one
// product, without a copy of either.
#pragma once

#include <ATen/ATen.h>

namespace mcore_bridge {

/// Uninitialised [..., columns] with `room` elements behind each row, which show as its stride. 0: contiguous.
inline at::Tensor empty_with_room(at::IntArrayRef sizes, int64_t room, const at::TensorOptions& options) {
  if (room == 0) return at::empty(sizes, options);
  auto whole = sizes.vec();
  whole.back() += room;
  return at::empty(whole, options).narrow(-1, 0, sizes.back());
}

/// `x` itself, or copied to where it has room.
inline at::Tensor moved_to_room(const at::Tensor& x, int64_t room) {
  if (room == 0) return x;
  auto wide = empty_with_room(x.sizes(), room, x.options());
  return wide.copy_(x);
}

/// Elements behind each row of `matrix` [rows, columns].
inline int64_t room_of(const at::Tensor& matrix) { return matrix.stride(0) - matrix.size(1); }

/// [rows, columns + used]: the rows with the first `used` elements behind them.
inline at::Tensor with_room(const at::Tensor& matrix, int64_t used) {
  TORCH_INTERNAL_ASSERT(matrix.dim() == 2 && matrix.stride(1) == 1 && room_of(matrix) >= used);
  return matrix.as_strided({matrix.size(0), matrix.size(1) + used}, matrix.strides());
}

}  // namespace mcore_bridge
