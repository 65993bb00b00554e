#include "layers/activation.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "mcore_bridge/error.h"

namespace mcore_bridge {

Activation parse_activation(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "quick_gelu") return Activation::kQuickGelu;
  fail("hidden_act: ", name, " is not one of silu, gelu, gelu_tanh, quick_gelu");
}

GatedOptions gated_options(const ModelConfig& config) {
  return {parse_activation(config.hidden_act), config.activation_func_clamp_value, config.glu_linear_offset};
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct Gated : torch::autograd::Function<Gated> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, int64_t activation,
                            std::optional<double> clamp, double offset) {
    context->save_for_backward({x});
    context->saved_data["activation"] = activation;
    context->saved_data["clamp"] = clamp;
    context->saved_data["offset"] = offset;
    return gated_activation_forward(x, {static_cast<Activation>(activation), clamp, offset});
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const GatedOptions options{static_cast<Activation>(context->saved_data["activation"].toInt()),
                               context->saved_data["clamp"].toOptional<double>(),
                               context->saved_data["offset"].toDouble()};
    return {gated_activation_backward(grads[0], context->get_saved_variables()[0], options, false).x, Variable(),
            Variable(), Variable()};
  }
};

}  // namespace

at::Tensor gated_activation(const at::Tensor& x, const GatedOptions& options) {
  return Gated::apply(x, static_cast<int64_t>(options.activation), options.clamp, options.offset);
}

}  // namespace mcore_bridge
