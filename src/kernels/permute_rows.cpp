#include "kernels/permute_rows.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "kernels/device.h"

namespace mcore_bridge {
namespace {

/// Rows of `x` by index; with padding an index beyond the last row means a zero row.
at::Tensor take_rows(const at::Tensor& x, const at::Tensor& index, bool padded) {
  if (!padded) return x.index_select(0, index);
  auto sizes = x.sizes().vec();
  sizes[0] = 1;
  return at::cat({x, at::zeros(sizes, x.options())}).index_select(0, index);
}

/// [n, h] rows -> [t, k, h] in the order of the places.
at::Tensor by_place(const at::Tensor& rows, const Permutation& p) {
  return take_rows(rows, p.inverse, p.padded).view({p.inverse.size(0) / p.topk, p.topk, rows.size(1)});
}

std::optional<cuda::Type> permute_type(const at::Tensor& x) {
  const auto type = kernel_type(x);
  return type && x.numel() > 0 && vector_rows(x.size(1), *type) ? type : std::nullopt;
}

/// What the kernels read of the permutation. `weights` fp32 and contiguous, or undefined.
cuda::PermuteRows arguments(const at::Tensor& like, const at::Tensor& weights, const Permutation& p) {
  return {.tokens = p.inverse.size(0) / p.topk,
          .rows = p.order.size(0),
          .columns = like.size(1),
          .topk = static_cast<int>(p.topk),
          .row_of_place = p.inverse.const_data_ptr<int64_t>(),
          .weights = weights.defined() ? weights.const_data_ptr<float>() : nullptr};
}

at::Tensor fp32(const at::Tensor& weights) {
  return weights.defined() ? weights.to(at::kFloat).contiguous() : at::Tensor();
}

at::Tensor rows_like(const at::Tensor& x, const Permutation& p) {
  const std::vector<int64_t> sizes{p.order.size(0), x.size(1)};
  return p.padded ? at::zeros(sizes, x.options()) : at::empty(sizes, x.options());
}

}  // namespace

at::Tensor take_places(const at::Tensor& places, const Permutation& p) { return take_rows(places, p.order, p.padded); }

at::Tensor spread_rows(const at::Tensor& given, const at::Tensor& weights, const Permutation& p) {
  const auto type = permute_type(given);
  if (!type) {
    // The token of each row; t for rows without a place.
    auto rows = take_rows(given, p.order.div(p.topk, "floor"), p.padded);
    return weights.defined() ? rows.mul_(take_places(weights.flatten(), p).unsqueeze(1).to(rows.scalar_type())) : rows;
  }
  const c10::DeviceGuard guard(given.device());
  const auto x = readable(given), w = fp32(weights);
  auto out = rows_like(x, p);
  auto k = arguments(x, w, p);
  k.x = pointer(x);
  k.out = mutable_pointer(out);
  cuda::spread_rows(k, *type, current_stream(x));
  return out;
}

at::Tensor combine_rows(const at::Tensor& given, const at::Tensor& weights, const Permutation& p) {
  const auto type = permute_type(given);
  if (!type) {
    const auto places = by_place(given, p);
    if (!weights.defined()) return places.sum(1);
    // A batched [1, k] x [k, h] product: no [t, k, h] copy of the weighted rows.
    return at::bmm(weights.to(given.scalar_type()).unsqueeze(1), places).squeeze(1);
  }
  const c10::DeviceGuard guard(given.device());
  const auto rows = readable(given), w = fp32(weights);
  auto out = at::empty({p.inverse.size(0) / p.topk, rows.size(1)}, rows.options());
  auto k = arguments(rows, w, p);
  k.x = pointer(rows);
  k.out = mutable_pointer(out);
  cuda::combine_rows(k, *type, current_stream(rows));
  return out;
}

CombineGradients combine_rows_backward(const at::Tensor& given_grad, const at::Tensor& given, const at::Tensor& weights,
                                       const Permutation& p, bool want_rows, bool want_weights) {
  CombineGradients result;
  if (!want_weights) {
    if (want_rows) result.rows = spread_rows(given_grad, weights, p);
    return result;
  }
  const auto type = permute_type(given_grad);
  if (!type) {
    result.weights = at::bmm(by_place(given, p), given_grad.unsqueeze(2)).squeeze(2).to(weights.scalar_type());
    if (want_rows) result.rows = spread_rows(given_grad, weights, p);
    return result;
  }
  const c10::DeviceGuard guard(given_grad.device());
  const auto grad = readable(given_grad), rows = readable(given), w = fp32(weights);
  auto products = at::empty(w.sizes(), w.options());
  auto k = arguments(grad, w, p);
  k.x = pointer(grad);
  k.against = pointer(rows);
  k.products = products.mutable_data_ptr<float>();
  if (want_rows) result.rows = rows_like(grad, p);
  k.out = mutable_pointer(result.rows);
  cuda::spread_rows(k, *type, current_stream(grad));
  result.weights = products.to(weights.scalar_type());
  return result;
}

}  // namespace mcore_bridge
