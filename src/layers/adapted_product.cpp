#include "layers/adapted_product.h"

#include <ATen/ATen.h>

#include "kernels/cuda/graph.h"
#include "kernels/room.h"
#include "layers/linear_function.h"

namespace mcore_bridge {
namespace {

/// Rows whose products take microseconds, so that one less in a chain of them counts.
constexpr int64_t kFewRows = 1024;

bool few(const LinearPlan& plan, const at::Tensor& rows) {
  return rows.is_cuda() && !plan.fp8 && plan.adapters.size() == 1 && rows.size(0) <= kFewRows;
}

/// x as the adapter sees it.
at::Tensor dropped(const at::Tensor& x, double dropout, AdaptedProduct& result) {
  auto& mask = result.mask.emplace_back();
  if (dropout == 0) return x;
  at::Tensor seen;
  std::tie(seen, mask) = at::native_dropout(x, dropout, true);
  return seen;
}

/// W's own product, with the bias of a column-parallel layer.
at::Tensor plain(const LinearPlan& plan, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return plan.column && bias.defined() ? at::addmm(bias, x, weight.t()) : at::mm(x, weight.t());
}

void in_one_product(const LinearPlan& plan, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                    const at::Tensor& a, const at::Tensor& b, AdaptedProduct& result) {
  const auto& adapter = plan.adapters[0];
  const auto in = x.size(1), columns = a.size(0);
  const auto wide_x = with_room(x, columns), wide_weight = with_room(weight, columns);
  const auto join = cuda::run_aside([&] {
    result.b = {expand_b(b, adapter.parts, plan.layout, adapter.scaling, wide_weight.narrow(1, in, columns))};
  });
  auto low = wide_x.narrow(1, in, columns);
  at::mm_out(low, x, a.t());
  join();
  result.y = plain(plan, wide_x, wide_weight, bias);
  // A copy, since what is kept would keep x.
  result.low = {at::empty({x.size(0), columns}, x.options())};
  cuda::run_beside([kept = result.low[0], low] { kept.copy_(low); });
  result.mask.resize(1);
  result.scaling = {1};
}

/// B as the product sees it.
void add_b(const LinearPlan& plan, size_t index, const at::Tensor& b, AdaptedProduct& result) {
  const auto& adapter = plan.adapters[index];
  const bool fused = adapter.parts.size() > 1;
  result.b.push_back(fused ? expand_b(b, adapter.parts, plan.layout, adapter.scaling) : b);
  result.scaling.push_back(fused ? 1 : adapter.scaling);
}

void beside(const LinearPlan& plan, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
            const at::Tensor& a, const at::Tensor& b, AdaptedProduct& result) {
  const auto seen = dropped(x, plan.adapters[0].dropout, result);
  const auto join = cuda::run_aside([&] {
    result.low = {at::mm(seen, a.t())};
    add_b(plan, 0, b, result);
  });
  result.y = plain(plan, x, weight, bias);
  join();
  result.y.addmm_(result.low[0], result.b[0].t(), 1, result.scaling[0]);
}

}  // namespace

at::Tensor scaled_product(const at::Tensor& a, const at::Tensor& b, double scaling) {
  if (scaling == 1) return at::mm(a, b);
  auto result = at::empty({a.size(0), b.size(1)}, a.options());
  return at::addmm_out(result, result, a, b, 0, scaling);
}

int64_t product_room(const LinearPlan& plan, const at::Tensor& weight, const std::vector<at::Tensor>& a) {
  // Masks of dropout are drawn by the order of elements in memory, which a layer that is recomputed may have otherwise.
  if (plan.adapters.size() != 1 || plan.adapters[0].dropout > 0 || plan.fp8) return 0;
  if (plan.sequence_parallel && plan.group.size() > 1) return 0;
  const auto room = room_of(weight);
  return a[0].size(0) <= room ? room : 0;
}

AdaptedProduct adapted_product(const LinearPlan& plan, const at::Tensor& x, int64_t room, const at::Tensor& weight,
                               const at::Tensor& bias, const std::vector<at::Tensor>& a,
                               const std::vector<at::Tensor>& b, bool unused) {
  AdaptedProduct result;
  auto& y = result.y;
  if (unused) {
    y = at::zeros({1, 1}, x.options()).expand({x.size(0), weight.size(0)});
  } else if (room > 0) {
    in_one_product(plan, x, weight, bias, a[0], b[0], result);
    return result;
  } else if (few(plan, x)) {
    beside(plan, x, weight, bias, a[0], b[0], result);
    return result;
  }
  for (size_t i = 0; i < plan.adapters.size(); ++i) {
    result.low.push_back(at::mm(dropped(x, plan.adapters[i].dropout, result), a[i].t()));
    add_b(plan, i, b[i], result);
    if (unused) continue;
    if (y.defined()) {
      y.addmm_(result.low[i], result.b[i].t(), 1, result.scaling[i]);
    } else {
      y = plan.fp8 ? plan.fp8->product(x, weight.size(0)) : at::Tensor();
      y = y.defined() ? at::addmm_out(y, y, result.low[i], result.b[i].t(), 0, result.scaling[i])
                      : scaled_product(result.low[i], result.b[i].t(), result.scaling[i]);
    }
  }
  if (unused) return result;
  if (!plan.fp8 && !y.defined()) {
    y = plain(plan, x, weight, bias);
    return result;
  }
  if (plan.fp8) {
    y = plan.fp8->forward(x, weight, y, &result.amax);
  } else {
    y.addmm_(x, weight.t());  // the large product accumulates onto the small one
  }
  if (plan.column && bias.defined()) y.add_(bias);
  return result;
}

AdaptedGradient adapted_input_gradient(const LinearPlan& plan, const at::Tensor& grad_y, const Fp8Matrix& grad_fp8,
                                       const at::Tensor& weight, const std::vector<at::Tensor>& a,
                                       const std::vector<at::Tensor>& b, const std::vector<at::Tensor>& mask,
                                       const std::vector<double>& scaling) {
  AdaptedGradient result;
  auto& x = result.x;
  if (few(plan, grad_y) && !mask[0].defined()) {
    const auto join = cuda::run_aside([&] { result.low = {scaled_product(grad_y, b[0], scaling[0])}; });
    x = at::mm(grad_y, weight);
    join();
    x.addmm_(result.low[0], a[0]);
    return result;
  }
  for (size_t i = 0; i < plan.adapters.size(); ++i) {
    const auto& low = result.low.emplace_back(scaled_product(grad_y, b[i], scaling[i]));
    if (mask[i].defined()) {
      const auto seen = at::native_dropout_backward(at::mm(low, a[i]), mask[i], 1 / (1 - plan.adapters[i].dropout));
      x = x.defined() ? x.add_(seen) : seen;
    } else if (x.defined()) {
      x.addmm_(low, a[i]);
    } else if (plan.fp8) {
      x = plan.fp8->product(low, a[i].size(1));
      at::mm_out(x, low, a[i]);
    } else {
      x = at::mm(low, a[i]);
    }
  }
  if (plan.fp8) {
    x = plan.fp8->input_gradient(grad_fp8, grad_y.size(0), grad_y.scalar_type(), weight, x);
  } else {
    x = x.defined() ? x.addmm_(grad_y, weight) : at::mm(grad_y, weight);
  }
  return result;
}

}  // namespace mcore_bridge
