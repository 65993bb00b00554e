#include "layers/moe/router_logits.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "layers/given.h"
#include "layers/main_gradient.h"

namespace mcore_bridge {
namespace {

/// bf16 numbers multiply exactly in fp32, which is what tensor cores add up in: no fp32 copies of x and the weight, and
/// no fp32 units, which are thirty times slower.
bool on_tensor_cores(const at::Tensor& x, const at::Tensor& weight, at::ScalarType type) {
  return x.is_cuda() && type == at::kFloat && x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16;
}

/// An fp32 gradient as the sum of two bf16 ones: 16 bits of its mantissa.
struct Split {
  at::Tensor high, low;
  explicit Split(const at::Tensor& grad) : high(grad.to(at::kBFloat16)), low((grad - high).to(at::kBFloat16)) {}
};

struct Logits : torch::autograd::Function<Logits> {
  using Context = torch::autograd::AutogradContext;
  static at::Tensor forward(Context* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, at::ScalarType type) {
    context->save_for_backward({weight.requires_grad() ? x : at::Tensor(), weight});
    context->saved_data["bias"] = bias.has_value();
    if (!on_tensor_cores(x, weight, type))
      return at::linear(x.to(type), weight.to(type), bias ? std::optional(bias->to(type)) : std::nullopt);
    auto logits = at::mm(x, weight.t(), type);
    return bias ? logits.add_(*bias) : logits;
  }
  static torch::autograd::variable_list backward(Context* context, torch::autograd::variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto& grad = grads[0];
    const auto &x = saved[0], &weight = saved[1];
    const bool wants_x = context->needs_input_grad(0), wants_weight = context->needs_input_grad(1);
    torch::autograd::variable_list result(4);
    if (grad.is_cuda() && grad.scalar_type() == at::kFloat && weight.scalar_type() == at::kBFloat16) {
      const Split split(grad);
      if (wants_x) result[0] = at::mm(at::cat({split.high, split.low}, 1), at::cat({weight, weight}));
      if (wants_weight) {
        auto sum = at::empty(weight.sizes(), grad.options());
        accumulate_product(sum, split.high, x, /*accumulate=*/false);
        accumulate_product(sum, split.low, x, /*accumulate=*/true);
        result[1] = sum.to(weight.scalar_type());
      }
    } else {
      if (wants_x) result[0] = grad.mm(weight.to(grad.scalar_type())).to(weight.scalar_type());
      if (wants_weight) result[1] = grad.t().mm(x.to(grad.scalar_type())).to(weight.scalar_type());
    }
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2))
      result[2] = grad.sum(0).to(weight.scalar_type());
    return result;
  }
};

}  // namespace

at::Tensor router_logits(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::ScalarType type) {
  return Logits::apply(x, weight, given(bias), type);
}

}  // namespace mcore_bridge
