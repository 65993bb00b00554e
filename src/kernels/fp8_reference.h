// The roundings of FP8 in plain ATen: what every kernel computes.
#pragma once

#include <ATen/ATen.h>

namespace mcore_bridge {

inline double largest(at::ScalarType format) { return format == at::kFloat8_e5m2 ? 57344.0 : 448.0; }

/// largest / amax, and its inverse.
inline at::Tensor factor_of(const at::Tensor& amax, at::ScalarType format) {
  const auto factor = at::where(amax > 0, at::full_like(amax, largest(format)) / amax, at::ones_like(amax));
  return at::where(factor.isfinite(), factor, at::zeros_like(factor));
}
inline at::Tensor scale_of(const at::Tensor& factor) {
  return at::where(factor > 0, factor.reciprocal(), at::ones_like(factor));
}

inline at::Tensor rounded(const at::Tensor& values, at::ScalarType format) {
  return values.clamp(-largest(format), largest(format)).to(format);
}

inline at::Tensor magnitude(const at::Tensor& x, at::IntArrayRef dims) {
  return x.abs().nan_to_num(0, INFINITY).amax(dims);
}

}  // namespace mcore_bridge
