// A fused query-key-value row taken apart, its heads normalised (q and k norms) and rotated on the way. No autograd.
//
// Shapes: s sequence, b batch, g key/value groups, p query heads per group, d head width; heads = g * p.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/rms_norm.h"

namespace mcore_bridge {

struct SplitQkvOptions {
  int64_t groups = 1, per_group = 1, d = 0;
  at::Tensor cos, sin;  ///< [s, b or 1, 1, rotated / 2]; undefined: no rotation
  bool interleaved = false;
  at::Tensor q_weight, k_weight;  ///< [d]; undefined: heads are not normalised
  RmsNormOptions norm;
};

struct Qkv {
  at::Tensor q, k, v;  ///< [s, b, heads, d], [s, b, g, d], [s, b, g, d]
};

/// `mixed`: [s, b, g * (p + 2) * d]. q and k are new; v is a view into mixed when `view_v`, else new too.
Qkv split_qkv_forward(const at::Tensor& mixed, const SplitQkvOptions& options, bool view_v);

struct SplitQkvGradients {
  at::Tensor mixed, q_weight, k_weight;  ///< weights undefined unless asked for
};
/// `mixed` is read only when heads are normalised.
SplitQkvGradients split_qkv_backward(const Qkv& grads, const at::Tensor& mixed, const SplitQkvOptions& options,
                                     bool want_weights);

/// Rotates the first 2 * cos.size(-1) entries of the last dim; pairs are (i, i + half), or (2i, 2i + 1) when
/// interleaved. `inverse`: by the negative angles, which is also the gradient.
at::Tensor rotate_heads(const at::Tensor& x_sbnd, const at::Tensor& cos, const at::Tensor& sin, bool interleaved,
                        bool inverse);

}  // namespace mcore_bridge
