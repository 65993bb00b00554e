// RMSNorm with the residual addition in front of it. No autograd: layers call forward and backward themselves.
//
// y = x / sqrt(mean(x^2) + epsilon) * weight over the last dim, in fp32; (1 + weight) when zero-centred.
#pragma once

#include <ATen/core/Tensor.h>

namespace mcore_bridge {

struct RmsNormOptions {
  double epsilon = 1e-5;
  bool zero_centered = false;
};

struct RmsNormOutput {
  at::Tensor normed;
  at::Tensor sum;   ///< x + delta, what was normalised; x itself without delta
  at::Tensor rstd;  ///< 1 / sqrt(mean + epsilon), fp32 (float64 for float64), one per row
};

/// `delta`: same shape as x or undefined. `room`: elements of memory behind each normed row (kernels/room.h).
RmsNormOutput rms_norm_forward(const at::Tensor& x, const at::Tensor& delta, const at::Tensor& weight,
                               const RmsNormOptions& options, int64_t room = 0);

/// The normed rows again, from what forward kept.
at::Tensor rms_norm_apply(const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight,
                          const RmsNormOptions& options);

struct RmsNormGradients {
  at::Tensor x;
  at::Tensor weight;  ///< undefined unless asked for
  at::Tensor normed;  ///< the normed rows again, undefined unless asked for
};

/// `grad_residual`: added to the gradient of x; or undefined.
RmsNormGradients rms_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& rstd,
                                   const at::Tensor& weight, const at::Tensor& grad_residual,
                                   const RmsNormOptions& options, bool want_weight, bool want_normed);

}  // namespace mcore_bridge
