#include "layers/norm.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, double epsilon,
                            bool zero_centered) {
    const auto output = rms_norm_forward(x, {}, weight, {.epsilon = epsilon, .zero_centered = zero_centered});
    context->save_for_backward({x, output.rstd, weight});
    context->saved_data["zero_centered"] = zero_centered;
    return output.normed;
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const RmsNormOptions options{.zero_centered = context->saved_data["zero_centered"].toBool()};
    const auto back = rms_norm_backward(grads[0], saved[0], saved[1], saved[2], {}, options,
                                        context->needs_input_grad(1), /*want_normed=*/false);
    return {back.x, back.weight, Variable(), Variable()};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon, bool zero_centered) {
  return RmsNormFunction::apply(x, weight, epsilon, zero_centered);
}

Norm::Norm(NormOptions options, at::TensorOptions tensor_options)
    : options_(options), weight_(at::empty({options.size}, tensor_options).requires_grad_(true)) {}

std::vector<NamedParameter> Norm::own_parameters() const {
  return {{"weight", weight_, {.sum_over_tp = options_.sum_over_tp, .no_weight_decay = true}}};
}

at::Tensor Norm::forward(const at::Tensor& x) const {
  return rms_norm(x, weight_, options_.epsilon, options_.zero_centered);
}

Footprint rms_norm_footprint(int64_t rows, int64_t width, bool weight_grad, const ActivationShape& shape) {
  Footprint result{.output_grad = shape.input_grad || weight_grad};
  if (!result.output_grad) return result;
  result.saved = rows * 4 + (shape.input_kept ? 0 : rows * width * shape.element);
  result.workspace = 2 * rows * width * shape.element;
  return result;
}

Footprint Norm::footprint(const ActivationShape& shape) const {
  return rms_norm_footprint(shape.tokens(), options_.size, weight_.requires_grad(), shape);
}

}  // namespace mcore_bridge
