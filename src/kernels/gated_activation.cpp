#include "kernels/gated_activation.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "kernels/device.h"

namespace mcore_bridge {
namespace {

at::Tensor activate(const at::Tensor& gate, Activation activation) {
  if (activation == Activation::kSilu) return at::silu(gate);
  return at::gelu(gate, activation == Activation::kGelu ? "none" : "tanh");
}

at::Tensor activate_backward(const at::Tensor& grad, const at::Tensor& gate, Activation activation) {
  if (activation == Activation::kSilu) return at::silu_backward(grad, gate);
  return at::gelu_backward(grad, gate, activation == Activation::kGelu ? "none" : "tanh");
}

std::optional<cuda::Type> gated_type(const at::Tensor& x) {
  const auto type = kernel_type(x);
  return type && x.numel() > 0 && vector_rows(x.size(-1) / 2, *type) ? type : std::nullopt;
}

at::Tensor half_width(const at::Tensor& x) {
  auto sizes = x.sizes().vec();
  sizes.back() /= 2;
  return at::empty(sizes, x.options());
}

cuda::Gated arguments(const at::Tensor& x, Activation activation) {
  return {.rows = x.numel() / x.size(-1),
          .width = x.size(-1) / 2,
          .activation = static_cast<int>(activation),
          .x = pointer(x)};
}

}  // namespace

at::Tensor gated_activation_forward(const at::Tensor& given, Activation activation) {
  const auto half = given.size(-1) / 2;
  const auto type = gated_type(given);
  if (!type) return activate(given.narrow(-1, 0, half), activation).mul_(given.narrow(-1, half, half));
  const c10::DeviceGuard guard(given.device());
  const auto x = readable(given);
  auto out = half_width(x);
  auto p = arguments(x, activation);
  p.out = mutable_pointer(out);
  cuda::gated_forward(p, *type, current_stream(x));
  return out;
}

GatedGradients gated_activation_backward(const at::Tensor& given_grad, const at::Tensor& given, Activation activation,
                                         bool want_out) {
  const auto half = given.size(-1) / 2;
  GatedGradients result;
  result.x = at::empty(given.sizes(), given.options());
  const auto type = gated_type(given);
  if (!type) {
    const auto gate = given.narrow(-1, 0, half), up = given.narrow(-1, half, half);
    auto grad_up = result.x.narrow(-1, half, half);
    auto activated = activate(gate, activation);
    at::mul_out(grad_up, activated, given_grad);
    result.x.narrow(-1, 0, half).copy_(activate_backward(given_grad * up, gate, activation));
    if (want_out) result.out = activated.mul_(up);
    return result;
  }
  const c10::DeviceGuard guard(given.device());
  const auto x = readable(given), grad = readable(given_grad);
  if (want_out) result.out = half_width(x);
  auto p = arguments(x, activation);
  p.grad = pointer(grad);
  p.grad_x = mutable_pointer(result.x);
  p.out = mutable_pointer(result.out);
  cuda::gated_backward(p, *type, current_stream(x));
  return result;
}

}  // namespace mcore_bridge
