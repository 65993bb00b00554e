#include "layers/moe/permutation.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "layers/given.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// A permutation as an autograd context keeps it; `tensors` are what the backward reads of it.
void keep(AutogradContext* context, const Permutation& p, variable_list tensors) {
  context->saved_data["topk"] = p.topk;
  context->saved_data["padded"] = p.padded;
  context->save_for_backward(std::move(tensors));
}
Permutation kept(AutogradContext* context, at::Tensor order, at::Tensor inverse) {
  return {std::move(order), std::move(inverse), context->saved_data["topk"].toInt(),
          context->saved_data["padded"].toBool()};
}

struct Permute : torch::autograd::Function<Permute> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const Permutation* p) {
    keep(context, *p, {p->order, p->inverse});
    return spread_rows(x, {}, *p);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    return {combine_rows(grads[0], {}, kept(context, saved[0], saved[1])), Variable()};
  }
};

struct Unpermute : torch::autograd::Function<Unpermute> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& rows, const std::optional<at::Tensor>& weights,
                            const Permutation* p) {
    keep(context, *p, {p->order, p->inverse, weights ? rows : at::Tensor(), weights.value_or(at::Tensor())});
    return combine_rows(rows, weights.value_or(at::Tensor()), *p);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto p = kept(context, saved[0], saved[1]);
    const bool rows = context->needs_input_grad(0);
    if (!saved[3].defined()) return {rows ? spread_rows(grads[0], {}, p) : at::Tensor(), Variable(), Variable()};
    const auto back = combine_rows_backward(grads[0], saved[2], saved[3], p, rows, context->needs_input_grad(1));
    return {back.rows, back.weights, Variable()};
  }
};

}  // namespace

Permutation permutation(const at::Tensor& experts) {
  at::NoGradGuard no_grad;
  const auto order = experts.flatten().argsort(/*stable=*/true, 0, /*descending=*/false);
  const auto rows = at::arange(order.size(0), order.options());
  return {order, at::empty_like(order).scatter_(0, order, rows), experts.size(1)};
}

Permutation padded_permutation(const at::Tensor& experts, int64_t count, int64_t capacity) {
  at::NoGradGuard no_grad;
  const auto places = experts.numel(), rows = count * capacity;
  const auto sorted = permutation(experts);
  // A place's row: its expert's first row and its rank among the expert's places.
  const auto expert = experts.flatten().index_select(0, sorted.order);
  const auto position = at::arange(places, expert.options());
  const auto first = at::searchsorted(expert, expert);  // the expert's first place in the sorted order
  auto row = (expert * capacity + position - first).masked_fill(expert.ge(count), rows);
  const auto inverse = at::empty_like(row).scatter_(0, sorted.order, row);
  const auto order = at::full({rows + 1}, places, expert.options()).scatter_(0, row, sorted.order).narrow(0, 0, rows);
  return {order.contiguous(), inverse, experts.size(1), true};
}

at::Tensor permute_tokens(const at::Tensor& x, const Permutation& p) { return Permute::apply(x, &p); }

at::Tensor unpermute_tokens(const at::Tensor& rows, const at::Tensor& weights, const Permutation& p) {
  return Unpermute::apply(rows, given(weights), &p);
}

at::Tensor by_row(const at::Tensor& places, const Permutation& p) { return take_places(places.flatten(), p); }

}  // namespace mcore_bridge
