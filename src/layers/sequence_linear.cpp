#include "layers/sequence_linear.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "layers/overlapped_matmul.h"
#include "layers/weight_gradients.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor matrix(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }

/// [rows, n] -> [-1, b, n] with the batch of `like`.
at::Tensor shaped(const at::Tensor& rows, const at::Tensor& like) {
  return rows.view({-1, like.size(1), rows.size(-1)});
}

/// Autograd takes no undefined tensor for an input.
std::optional<at::Tensor> given(const at::Tensor& x) {
  return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
}

struct GroupHolder : torch::CustomClassHolder {
  Group group;
  bool overlap;
  GroupHolder(Group g, bool o) : group(std::move(g)), overlap(o) {}
};

/// dW = grad^T x, or undefined when the schedule wants it later.
at::Tensor weight_gradient(const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& x) {
  if (auto* later = WeightGradients::current()) {
    later->add(weight, [grad, x] { return at::mm(grad.t(), x); });
    return {};
  }
  return at::mm(grad.t(), x);
}

void keep_group(AutogradContext* context, const Group& group, bool overlap) {
  context->saved_data["group"] = at::IValue::make_capsule(c10::make_intrusive<GroupHolder>(group, overlap));
}
const GroupHolder& kept_group(AutogradContext* context) {
  return *static_cast<const GroupHolder*>(context->saved_data["group"].toCapsule().get());
}

struct Gathered : Function<Gathered> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& given_bias, const Group* tp, bool overlap) {
    const auto bias = given_bias.value_or(at::Tensor());
    context->saved_data["bias"] = bias.defined();
    keep_group(context, *tp, overlap);
    // A frozen weight's gradient never asks for x.
    context->save_for_backward({weight.requires_grad() ? x : at::Tensor(), weight});
    if (overlap) return shaped(gather_matmul(matrix(x), weight, bias, *tp), x);
    const auto whole = matrix(tp->all_gather(x));
    return shaped(bias.defined() ? at::addmm(bias, whole, weight.t()) : at::mm(whole, weight.t()), x);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto& kept = kept_group(context);
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1];
    const bool wants_x = context->needs_input_grad(0), wants_weight = context->needs_input_grad(1) && x.defined();
    const auto grad = matrix(grads[0]);
    variable_list result(5);
    at::Tensor whole;
    if (wants_x && kept.overlap) {
      result[0] =
          shaped(matmul_reduce_scatter(grad, weight.t(), {}, kept.group, wants_weight ? matrix(x) : at::Tensor(),
                                       wants_weight ? &whole : nullptr),
                 grads[0]);
    } else {
      if (wants_x) result[0] = kept.group.reduce_scatter(shaped(at::mm(grad, weight), grads[0]));
      if (wants_weight) whole = matrix(kept.group.all_gather(x));
    }
    if (wants_weight) result[1] = weight_gradient(weight, grad, whole);
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) result[2] = grad.sum(0);
    return result;
  }
};

struct Scattered : Function<Scattered> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& given_addend, const Group* tp, bool overlap) {
    const auto addend = given_addend.value_or(at::Tensor());
    context->saved_data["addend"] = addend.defined();
    keep_group(context, *tp, overlap);
    context->save_for_backward({weight.requires_grad() ? x : at::Tensor(), weight});
    const auto rows = matrix(x);
    const auto more = addend.defined() ? matrix(addend) : addend;
    if (overlap) return shaped(matmul_reduce_scatter(rows, weight, more, *tp), x);
    const auto partial = more.defined() ? at::addmm(more, rows, weight.t()) : at::mm(rows, weight.t());
    return tp->reduce_scatter(shaped(partial, x));
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto& kept = kept_group(context);
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1];
    const bool wants_x = context->needs_input_grad(0), wants_weight = context->needs_input_grad(1) && x.defined();
    variable_list result(5);
    at::Tensor whole;
    if (kept.overlap && wants_x) {
      result[0] = shaped(gather_matmul(matrix(grads[0]), weight.t(), {}, kept.group, &whole), grads[0]);
    } else {
      whole = matrix(kept.group.all_gather(grads[0]));
      if (wants_x) result[0] = shaped(at::mm(whole, weight), grads[0]);
    }
    if (wants_weight) result[1] = weight_gradient(weight, whole, matrix(x));
    if (context->saved_data["addend"].toBool() && context->needs_input_grad(2)) result[2] = shaped(whole, grads[0]);
    return result;
  }
};

}  // namespace

at::Tensor gathered_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const Group& tp,
                           bool overlap) {
  return Gathered::apply(x, weight, given(bias), &tp, overlap);
}

at::Tensor scattered_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& addend, const Group& tp,
                            bool overlap) {
  return Scattered::apply(x, weight, given(addend), &tp, overlap);
}

}  // namespace mcore_bridge
