#include "layers/moe/router_logits.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

#include "layers/given.h"
#include "layers/main_gradient.h"

namespace mcore_bridge {
namespace {

/// bf16 numbers multiply exactly in fp32, which is what tensor cores add up in: no fp32 copy of x, and no fp32 units,
/// which are thirty times slower. An fp32 weight is a sum of bf16 ones.
bool on_tensor_cores(const at::Tensor& operand, at::ScalarType x, at::ScalarType product) {
  return operand.is_cuda() && x == at::kBFloat16 && product == at::kFloat;
}

/// bf16 numbers whose sum is that of `numbers`, to 8 bits of the mantissa each: three hold all of an fp32 one.
std::vector<at::Tensor> bf16_parts(const at::Tensor& numbers, size_t count) {
  if (numbers.scalar_type() == at::kBFloat16) return {numbers};
  std::vector<at::Tensor> parts{numbers.to(at::kBFloat16)};
  for (auto rest = numbers; parts.size() < count;) {
    rest = rest - parts.back();
    parts.push_back(rest.to(at::kBFloat16));
  }
  return parts;
}

struct Logits : torch::autograd::Function<Logits> {
  using Context = torch::autograd::AutogradContext;
  static at::Tensor forward(Context* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, at::ScalarType type) {
    context->save_for_backward({weight.requires_grad() ? x : at::Tensor(), weight});
    context->saved_data["bias"] = bias.has_value();
    context->saved_data["x"] = static_cast<int64_t>(x.scalar_type());
    if (!on_tensor_cores(x, x.scalar_type(), type))
      return at::linear(x.to(type), weight.to(type), bias ? std::optional(bias->to(type)) : std::nullopt);
    const auto parts = bf16_parts(weight, 3);
    const auto several = static_cast<int64_t>(parts.size());
    auto logits = at::mm(x, (several > 1 ? at::cat(parts) : weight).t(), type);
    if (several > 1) logits = logits.view({x.size(0), several, weight.size(0)}).sum(1);
    return bias ? logits.add_(*bias) : logits;
  }
  static torch::autograd::variable_list backward(Context* context, torch::autograd::variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto& grad = grads[0];
    const auto &x = saved[0], &weight = saved[1];
    const auto x_type = static_cast<at::ScalarType>(context->saved_data["x"].toInt());
    const bool wants_x = context->needs_input_grad(0), wants_weight = context->needs_input_grad(1);
    torch::autograd::variable_list result(4);
    if (on_tensor_cores(grad, x_type, grad.scalar_type())) {
      // 16 bits of the mantissa for what is rounded to bf16, all of it for an fp32 gradient.
      const auto parts = bf16_parts(grad, weight.scalar_type() == at::kFloat ? 3 : 2);
      if (wants_x) {
        const auto weights = bf16_parts(weight, 2);
        std::vector<at::Tensor> left{parts[0], parts[1]}, right{weights[0], weights[0]};
        if (weights.size() > 1) {
          left.push_back(parts[0]);
          right.push_back(weights[1]);
        }
        result[0] = at::mm(at::cat(left, 1), at::cat(right));
      }
      if (wants_weight) {
        auto sum = at::empty(weight.sizes(), grad.options());
        for (size_t i = 0; i < parts.size(); ++i) accumulate_product(sum, parts[i], x, /*accumulate=*/i > 0);
        result[1] = sum.to(weight.scalar_type());
      }
    } else {
      if (wants_x) result[0] = grad.mm(weight.to(grad.scalar_type())).to(x_type);
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
