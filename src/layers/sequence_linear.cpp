#include "layers/sequence_linear.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "layers/given.h"
#include "layers/main_gradient.h"
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

using Fp8Ptr = std::shared_ptr<Fp8Linear>;

struct Holder : torch::CustomClassHolder {
  Group group;
  bool overlap;  // never with FP8
  Fp8Ptr fp8;
  at::Tensor amax;                     // what the FP8 input was scaled for
  std::shared_ptr<MainGradient> main;  // of the weight
  Holder(Group g, bool o, Fp8Ptr f) : group(std::move(g)), overlap(o), fp8(std::move(f)) {}
};

Holder& keep(AutogradContext* context, const at::Tensor& weight, const Group& group, bool overlap, const Fp8Ptr& fp8) {
  auto holder = c10::make_intrusive<Holder>(group, overlap, fp8);
  auto& kept = *holder;
  kept.main = main_gradient(weight);
  context->saved_data["holder"] = at::IValue::make_capsule(std::move(holder));
  return kept;
}
const Holder& kept_by(AutogradContext* context) {
  return *static_cast<const Holder*>(context->saved_data["holder"].toCapsule().get());
}

struct Gathered : Function<Gathered> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& given_bias, const Group* tp, bool overlap,
                            const Fp8Ptr* fp8) {
    const auto bias = given_bias.value_or(at::Tensor());
    context->saved_data["bias"] = bias.defined();
    auto& kept = keep(context, weight, *tp, overlap, *fp8);
    // A frozen weight's gradient never asks for x.
    context->save_for_backward({weight.requires_grad() ? x : at::Tensor(), weight});
    if (overlap) return shaped(gather_matmul(matrix(x), weight, bias, *tp), x);
    const auto whole = matrix(tp->all_gather(x));
    if (kept.fp8) {
      const auto y = kept.fp8->forward(whole, weight, {}, &kept.amax);
      return shaped(bias.defined() ? at::Tensor(y).add_(bias) : y, x);
    }
    return shaped(bias.defined() ? at::addmm(bias, whole, weight.t()) : at::mm(whole, weight.t()), x);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto& kept = kept_by(context);
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1];
    const bool wants_x = context->needs_input_grad(0), wants_weight = context->needs_input_grad(1) && x.defined();
    const auto grad = matrix(grads[0]);
    variable_list result(6);
    at::Tensor whole;
    if (wants_x && kept.overlap) {
      result[0] =
          shaped(matmul_reduce_scatter(grad, weight.t(), {}, kept.group, wants_weight ? matrix(x) : at::Tensor(),
                                       wants_weight ? &whole : nullptr),
                 grads[0]);
    } else if (kept.fp8) {
      const auto dy = kept.fp8->gradient(grad, wants_x, wants_weight);
      if (wants_x)
        result[0] = kept.group.reduce_scatter(
            shaped(kept.fp8->input_gradient(dy.straight, grad.size(0), grad.scalar_type(), weight, {}), grads[0]));
      if (wants_weight)
        result[1] = fp8_weight_gradient(weight, kept.main, dy.turned,
                                        kept.fp8->turned_input(matrix(kept.group.all_gather(x)), kept.amax));
    } else {
      if (wants_x) result[0] = kept.group.reduce_scatter(shaped(at::mm(grad, weight), grads[0]));
      if (wants_weight) whole = matrix(kept.group.all_gather(x));
    }
    if (wants_weight && !kept.fp8) result[1] = weight_gradient(weight, kept.main, grad, whole);
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) result[2] = grad.sum(0);
    return result;
  }
};

struct Scattered : Function<Scattered> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& given_addend, const Group* tp, bool overlap,
                            const Fp8Ptr* fp8) {
    const auto addend = given_addend.value_or(at::Tensor());
    context->saved_data["addend"] = addend.defined();
    auto& kept = keep(context, weight, *tp, overlap, *fp8);
    context->save_for_backward({weight.requires_grad() ? x : at::Tensor(), weight});
    const auto rows = matrix(x);
    const auto more = addend.defined() ? matrix(addend) : addend;
    if (overlap) return shaped(matmul_reduce_scatter(rows, weight, more, *tp), x);
    if (kept.fp8) {
      at::Tensor onto;  // not `more` itself, which autograd may keep
      if (more.defined()) (onto = kept.fp8->product(rows, weight.size(0))).copy_(more);
      return tp->reduce_scatter(shaped(kept.fp8->forward(rows, weight, onto, &kept.amax), x));
    }
    const auto partial = more.defined() ? at::addmm(more, rows, weight.t()) : at::mm(rows, weight.t());
    return tp->reduce_scatter(shaped(partial, x));
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto& kept = kept_by(context);
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1];
    const bool wants_x = context->needs_input_grad(0), wants_weight = context->needs_input_grad(1) && x.defined();
    variable_list result(6);
    at::Tensor whole;
    if (kept.overlap && wants_x) {
      result[0] = shaped(gather_matmul(matrix(grads[0]), weight.t(), {}, kept.group, &whole), grads[0]);
    } else {
      whole = matrix(kept.group.all_gather(grads[0]));
      if (kept.fp8) {
        const auto dy = kept.fp8->gradient(whole, wants_x, wants_weight);
        if (wants_x)
          result[0] =
              shaped(kept.fp8->input_gradient(dy.straight, whole.size(0), whole.scalar_type(), weight, {}), grads[0]);
        if (wants_weight)
          result[1] = fp8_weight_gradient(weight, kept.main, dy.turned, kept.fp8->turned_input(matrix(x), kept.amax));
      } else if (wants_x) {
        result[0] = shaped(at::mm(whole, weight), grads[0]);
      }
    }
    if (wants_weight && !kept.fp8) result[1] = weight_gradient(weight, kept.main, whole, matrix(x));
    if (context->saved_data["addend"].toBool() && context->needs_input_grad(2)) result[2] = shaped(whole, grads[0]);
    return result;
  }
};

}  // namespace

at::Tensor gathered_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const Group& tp,
                           bool overlap, Fp8Ptr fp8) {
  return Gathered::apply(x, weight, given(bias), &tp, overlap, &fp8);
}

at::Tensor scattered_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& addend, const Group& tp,
                            bool overlap, Fp8Ptr fp8) {
  return Scattered::apply(x, weight, given(addend), &tp, overlap, &fp8);
}

}  // namespace mcore_bridge
