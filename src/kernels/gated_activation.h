// act(gate) * up for x = [gate | up] along the last dim. No autograd: layers call forward and backward themselves.
#pragma once

#include <ATen/core/Tensor.h>

namespace mcore_bridge {

enum class Activation { kSilu, kGelu, kGeluTanh };

at::Tensor gated_activation_forward(const at::Tensor& x, Activation activation);

struct GatedGradients {
  at::Tensor x;
  at::Tensor out;  ///< forward's result again, undefined unless asked for
};
GatedGradients gated_activation_backward(const at::Tensor& grad, const at::Tensor& x, Activation activation,
                                         bool want_out);

}  // namespace mcore_bridge
