// Tensors that may be absent, on their way into autograd.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace mcore_bridge {

/// Autograd takes no undefined tensor for an input.
inline std::optional<at::Tensor> given(const at::Tensor& x) {
  return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
}

}  // namespace mcore_bridge
