#include "layers/moe/permutation.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "layers/given.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// Rows of `x` by index; with padding an index beyond the last row means a zero row.
at::Tensor take_rows(const at::Tensor& x, const at::Tensor& index, bool padded) {
  if (!padded) return x.index_select(0, index);
  auto sizes = x.sizes().vec();
  sizes[0] = 1;
  return at::cat({x, at::zeros(sizes, x.options())}).index_select(0, index);
}

/// The token of each row of `order`; t for rows without a place.
at::Tensor token_of_rows(const at::Tensor& order, int64_t topk) { return order.div(topk, "floor"); }

/// [n, h] rows -> [t, k, h] in the order of the places.
at::Tensor by_place(const at::Tensor& rows, const at::Tensor& inverse, int64_t topk, bool padded) {
  return take_rows(rows, inverse, padded).view({inverse.size(0) / topk, topk, rows.size(1)});
}

struct Permute : torch::autograd::Function<Permute> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& order,
                            const at::Tensor& inverse, int64_t topk, bool padded) {
    context->save_for_backward({inverse});
    context->saved_data["topk"] = topk;
    context->saved_data["padded"] = padded;
    return take_rows(x, token_of_rows(order, topk), padded);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto inverse = context->get_saved_variables()[0];
    const auto places =
        by_place(grads[0], inverse, context->saved_data["topk"].toInt(), context->saved_data["padded"].toBool());
    return {places.sum(1), Variable(), Variable(), Variable(), Variable()};
  }
};

struct Unpermute : torch::autograd::Function<Unpermute> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& rows, const std::optional<at::Tensor>& weights,
                            const at::Tensor& order, const at::Tensor& inverse, int64_t topk, bool padded) {
    context->saved_data["topk"] = topk;
    context->saved_data["padded"] = padded;
    const auto places = by_place(rows, inverse, topk, padded);
    if (!weights) {
      context->save_for_backward({order});
      return places.sum(1);
    }
    context->save_for_backward({order, inverse, rows, *weights});
    // A batched [1, k] x [k, h] product: no [t, k, h] copy of the weighted rows.
    return at::bmm(weights->to(rows.scalar_type()).unsqueeze(1), places).squeeze(1);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto topk = context->saved_data["topk"].toInt();
    const bool padded = context->saved_data["padded"].toBool();
    const auto& order = saved[0];
    variable_list result(6);
    const bool weighted = saved.size() > 1;
    if (weighted && context->needs_input_grad(1)) {
      const auto products = at::bmm(by_place(saved[2], saved[1], topk, padded), grads[0].unsqueeze(2)).squeeze(2);
      result[1] = products.to(saved[3].scalar_type());
    }
    if (!context->needs_input_grad(0)) return result;
    result[0] = take_rows(grads[0], token_of_rows(order, topk), padded);
    if (weighted) {
      const auto weights = take_rows(saved[3].flatten(), order, padded);
      result[0].mul_(weights.unsqueeze(1).to(result[0].scalar_type()));
    }
    return result;
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

at::Tensor permute_tokens(const at::Tensor& x, const Permutation& p) {
  return Permute::apply(x, p.order, p.inverse, p.topk, p.padded);
}

at::Tensor unpermute_tokens(const at::Tensor& rows, const at::Tensor& weights, const Permutation& p) {
  return Unpermute::apply(rows, given(weights), p.order, p.inverse, p.topk, p.padded);
}

at::Tensor by_row(const at::Tensor& places, const Permutation& p) {
  return take_rows(places.flatten(), p.order, p.padded);
}

}  // namespace mcore_bridge
