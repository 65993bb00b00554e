#include "kernels/gated_activation.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "kernels/device.h"
#include "kernels/room.h"

namespace mcore_bridge {
namespace {

constexpr double kQuick = 1.702;

at::Tensor activate(const at::Tensor& gate, Activation activation) {
  if (activation == Activation::kSilu) return at::silu(gate);
  if (activation == Activation::kQuickGelu) return at::sigmoid(gate * kQuick).mul_(gate);
  return at::gelu(gate, activation == Activation::kGelu ? "none" : "tanh");
}

at::Tensor activate_backward(const at::Tensor& grad, const at::Tensor& gate, Activation activation) {
  if (activation == Activation::kSilu) return at::silu_backward(grad, gate);
  if (activation == Activation::kQuickGelu) {
    const auto s = at::sigmoid(gate * kQuick);
    return grad * s * (gate * (1 - s) * kQuick + 1);
  }
  return at::gelu_backward(grad, gate, activation == Activation::kGelu ? "none" : "tanh");
}

/// Clamped and shifted variants, and quick_gelu, have no kernel of their own.
std::optional<cuda::Type> gated_type(const at::Tensor& x, const GatedOptions& options) {
  if (!options.plain() || options.activation == Activation::kQuickGelu) return std::nullopt;
  const auto type = kernel_type(x);
  return type && x.numel() > 0 && vector_rows(x.size(-1) / 2, *type) ? type : std::nullopt;
}

at::Tensor half_width(const at::Tensor& x, int64_t room) {
  auto sizes = x.sizes().vec();
  sizes.back() /= 2;
  return empty_with_room(sizes, room, x.options());
}

cuda::Gated arguments(const at::Tensor& x, Activation activation) {
  return {.rows = x.numel() / x.size(-1),
          .width = x.size(-1) / 2,
          .activation = static_cast<int>(activation),
          .x = pointer(x)};
}

/// The halves as they enter the product: gate before its activation, up with its offset.
struct Halves {
  at::Tensor gate, up;
};

Halves halves(const at::Tensor& x, const GatedOptions& options) {
  const auto half = x.size(-1) / 2;
  Halves h{x.narrow(-1, 0, half), x.narrow(-1, half, half)};
  if (options.clamp) h = {h.gate.clamp_max(*options.clamp), h.up.clamp(-*options.clamp, *options.clamp)};
  if (options.offset != 0) h.up = h.up + options.offset;
  return h;
}

GatedGradients aten_backward(const at::Tensor& grad, const at::Tensor& x, const GatedOptions& options, bool want_out) {
  const auto half = x.size(-1) / 2;
  GatedGradients result{.x = at::empty(x.sizes(), x.options()), .out = {}};
  const auto [gate, up] = halves(x, options);
  auto grad_gate = result.x.narrow(-1, 0, half), grad_up = result.x.narrow(-1, half, half);
  auto activated = activate(gate, options.activation);
  at::mul_out(grad_up, activated, grad);
  grad_gate.copy_(activate_backward(grad * up, gate, options.activation));
  if (options.clamp) {  // what was cut passes no gradient
    const auto c = *options.clamp;
    grad_gate.masked_fill_(x.narrow(-1, 0, half).gt(c), 0);
    grad_up.masked_fill_(x.narrow(-1, half, half).abs().gt(c), 0);
  }
  if (want_out) result.out = activated.mul_(up);
  return result;
}

}  // namespace

at::Tensor gated_activation_forward(const at::Tensor& given, const GatedOptions& options, int64_t room) {
  const auto type = gated_type(given, options);
  if (!type) {
    const auto [gate, up] = halves(given, options);
    return moved_to_room(activate(gate, options.activation).mul_(up), room);
  }
  const c10::DeviceGuard guard(given.device());
  const auto x = readable(given);
  auto out = half_width(x, room);
  auto p = arguments(x, options.activation);
  p.out = mutable_pointer(out);
  p.out_stride = out.size(-1) + room;
  cuda::gated_forward(p, *type, current_stream(x));
  return out;
}

GatedGradients gated_activation_backward(const at::Tensor& given_grad, const at::Tensor& given,
                                         const GatedOptions& options, bool want_out) {
  const auto type = gated_type(given, options);
  if (!type) return aten_backward(given_grad, given, options, want_out);
  GatedGradients result{.x = at::empty(given.sizes(), given.options()), .out = {}};
  const c10::DeviceGuard guard(given.device());
  const auto x = readable(given), grad = readable(given_grad);
  if (want_out) result.out = half_width(x, 0);
  auto p = arguments(x, options.activation);
  p.grad = pointer(grad);
  p.grad_x = mutable_pointer(result.x);
  p.out = mutable_pointer(result.out);
  p.out_stride = p.width;
  cuda::gated_backward(p, *type, current_stream(x));
  return result;
}

}  // namespace mcore_bridge
