#include "layers/activation.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "mcore_bridge/error.h"

namespace mcore_bridge {

Activation parse_activation(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  fail("hidden_act: ", name, " is not one of silu, gelu, gelu_tanh");
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor activate(const at::Tensor& gate, Activation activation) {
  if (activation == Activation::kSilu) return at::silu(gate);
  return at::gelu(gate, activation == Activation::kGelu ? "none" : "tanh");
}

at::Tensor activate_backward(const at::Tensor& grad, const at::Tensor& gate, Activation activation) {
  if (activation == Activation::kSilu) return at::silu_backward(grad, gate);
  return at::gelu_backward(grad, gate, activation == Activation::kGelu ? "none" : "tanh");
}

struct Gated : torch::autograd::Function<Gated> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, int64_t activation) {
    context->save_for_backward({x});
    context->saved_data["activation"] = activation;
    const auto half = x.size(-1) / 2;
    return activate(x.narrow(-1, 0, half), static_cast<Activation>(activation)).mul_(x.narrow(-1, half, half));
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto x = context->get_saved_variables()[0];
    const auto activation = static_cast<Activation>(context->saved_data["activation"].toInt());
    const auto half = x.size(-1) / 2;
    const auto gate = x.narrow(-1, 0, half), up = x.narrow(-1, half, half);
    auto grad_x = at::empty(x.sizes(), x.options());
    auto grad_up = grad_x.narrow(-1, half, half);
    at::mul_out(grad_up, activate(gate, activation), grads[0]);
    grad_x.narrow(-1, 0, half).copy_(activate_backward(grads[0] * up, gate, activation));
    return {grad_x, Variable()};
  }
};

}  // namespace

at::Tensor gated_activation(const at::Tensor& x, Activation activation) {
  return Gated::apply(x, static_cast<int64_t>(activation));
}

}  // namespace mcore_bridge
