// act(gate) * up for x = [gate | up] along the last dim. No autograd: layers call forward and backward themselves.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace mcore_bridge {

enum class Activation { kSilu, kGelu, kGeluTanh, kQuickGelu /* x * sigmoid(1.702 x) */ };

/// act(min(gate, clamp)) * (clamp(up, -clamp, clamp) + offset).
struct GatedOptions {
  Activation activation = Activation::kSilu;
  std::optional<double> clamp = {};
  double offset = 0;
  GatedOptions() = default;
  GatedOptions(Activation a) : activation(a) {}  // NOLINT: an activation alone is the usual case
  GatedOptions(Activation a, std::optional<double> c, double o) : activation(a), clamp(c), offset(o) {}
  bool plain() const { return !clamp && offset == 0; }
};

/// `room`: elements of memory behind each row of the result (kernels/room.h).
at::Tensor gated_activation_forward(const at::Tensor& x, const GatedOptions& options, int64_t room = 0);

struct GatedGradients {
  at::Tensor x;
  at::Tensor out;  ///< forward's result again, undefined unless asked for
};
GatedGradients gated_activation_backward(const at::Tensor& grad, const at::Tensor& x, const GatedOptions& options,
                                         bool want_out);

}  // namespace mcore_bridge
