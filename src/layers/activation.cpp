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

struct Gated : torch::autograd::Function<Gated> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, int64_t activation) {
    context->save_for_backward({x});
    context->saved_data["activation"] = activation;
    return gated_activation_forward(x, static_cast<Activation>(activation));
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto activation = static_cast<Activation>(context->saved_data["activation"].toInt());
    return {gated_activation_backward(grads[0], context->get_saved_variables()[0], activation, false).x, Variable()};
  }
};

}  // namespace

at::Tensor gated_activation(const at::Tensor& x, Activation activation) {
  return Gated::apply(x, static_cast<int64_t>(activation));
}

}  // namespace mcore_bridge
