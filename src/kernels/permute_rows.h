// Rows of tokens in the order of their experts, and back. No autograd.
//
// Shapes: t tokens, k experts per token, t * k places; n rows; h hidden.
#pragma once

#include <ATen/core/Tensor.h>

namespace mcore_bridge {

struct Permutation {
  at::Tensor order;    ///< int64 [n]: the place each row comes from; t * k: none, the row is zero
  at::Tensor inverse;  ///< int64 [t * k]: the row of each place; n: none, the place was dropped
  int64_t topk = 1;
  bool padded = false;  ///< there may be rows without a place and places without a row
};

/// The entry of each row among those of its places, [t * k, ...] -> [n, ...]; 0 for rows without a place.
at::Tensor take_places(const at::Tensor& places, const Permutation& permutation);

/// x [t, h] -> [n, h]: the token of each row, times its place's weight. weights [t, k]; undefined: 1.
at::Tensor spread_rows(const at::Tensor& x, const at::Tensor& weights, const Permutation& permutation);

/// rows [n, h] -> [t, h]: the sum of each token's rows times their weights, without atomics. weights [t, k]; undefined:
/// 1.
at::Tensor combine_rows(const at::Tensor& rows, const at::Tensor& weights, const Permutation& permutation);

struct CombineGradients {
  at::Tensor rows, weights;  ///< undefined unless asked for
};
/// Of combine_rows with weights. `rows` is read for the weights' gradient only.
CombineGradients combine_rows_backward(const at::Tensor& grad, const at::Tensor& rows, const at::Tensor& weights,
                                       const Permutation& permutation, bool want_rows, bool want_weights);

}  // namespace mcore_bridge
