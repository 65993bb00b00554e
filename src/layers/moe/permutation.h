// The order of experts for rows of tokens, and autograd for the way there and back.
//
// Shapes: t tokens, k experts per token, t * k places; n rows; h hidden.
#pragma once

#include "kernels/permute_rows.h"

namespace mcore_bridge {

/// Places sorted by expert, stably: n = t * k. experts: int64 [t, k]; a dropped place holds a number above every
/// expert's and comes last.
Permutation permutation(const at::Tensor& experts);

/// Exactly `capacity` rows for each of `count` experts, n = count * capacity: its places, then rows without one. Places
/// beyond the capacity must be dropped ones.
Permutation padded_permutation(const at::Tensor& experts, int64_t count, int64_t capacity);

/// x [t, h] -> [n, h]: the token of each row. Backward adds the k gradients of a token without atomics.
at::Tensor permute_tokens(const at::Tensor& x, const Permutation& permutation);

/// rows [n, h] -> [t, h]: the weighted sum of each token's rows. weights [t, k]; undefined: plain sum.
at::Tensor unpermute_tokens(const at::Tensor& rows, const at::Tensor& weights, const Permutation& permutation);

/// The number of each place [t, k] -> of each row [n]; 0 for rows without a place.
at::Tensor by_row(const at::Tensor& places, const Permutation& permutation);

}  // namespace mcore_bridge
