#include "layers/linear_function.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <memory>

#include "layers/main_gradient.h"
#include "layers/weight_gradients.h"

namespace mcore_bridge {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// The places of tensors in the node's input list; adapters follow as pairs (A, B).
enum Slot : size_t { kX, kDelta, kWeight, kBias, kNormWeight, kAdapters };

/// autograd takes defined tensors only: which of the node's inputs each slot is, -1 for none.
using Edges = std::vector<int>;

struct Holder : torch::CustomClassHolder {
  LinearPlan plan;
  Edges edges;
  std::vector<std::shared_ptr<MainGradient>> main;  ///< by slot
  at::Tensor amax;                                  ///< FP8: what the input was scaled for

  /// The gradient of the weight from quantised matrices, as weight_gradient gives it.
  at::Tensor weight_gradient(const at::Tensor& weight, const Fp8Matrix& dy, const Fp8Matrix& x) const {
    return fp8_weight_gradient(weight, main[kWeight], dy, x);
  }

  /// a^T b, the gradient of `parameter`: into the main gradient, or returned for autograd when there is none, or put
  /// aside.
  at::Tensor weight_gradient(size_t slot, const at::Tensor& parameter, const at::Tensor& a, const at::Tensor& b) const {
    if (!main[slot]) return WeightGradients::now_or_later(parameter, [a, b] { return at::mm(a.t(), b); });
    return WeightGradients::now_or_later(parameter, main[slot], [a, b](const at::Tensor& grad, bool accumulate) {
      accumulate_product(grad, a, b, accumulate);
    });
  }

  /// The gradient of an adapter's B: scaling * grad_y^T low, of which an expanded one is collected.
  at::Tensor b_gradient(size_t slot, const at::Tensor& grad_y, const at::Tensor& low, size_t index) const {
    const auto& adapter = plan.adapters[index];
    auto into = [grad_y, low, adapter, layout = plan.layout](const at::Tensor& grad, bool accumulate) {
      if (adapter.parts.size() == 1) return accumulate_product(grad, grad_y, low, accumulate, adapter.scaling);
      collect_b(at::mm(grad_y.t(), low), grad, adapter.parts, layout, adapter.scaling, accumulate);
    };
    if (main[slot]) {
      contribute(*main[slot], into);
      return {};
    }
    const auto r = low.size(1) / std::count(adapter.parts.begin(), adapter.parts.end(), true);
    const auto grad = at::empty({adapted_rows(adapter.parts, plan.layout), r}, low.options());
    into(grad, false);
    return grad;
  }
};

/// scaling * a b.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, double scaling) {
  if (scaling == 1) return at::mm(a, b);
  auto result = at::empty({a.size(0), b.size(1)}, a.options());
  return at::addmm_out(result, result, a, b, 0, scaling);
}

at::Tensor matrix(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

at::Tensor shaped(const at::Tensor& rows, const at::Tensor& like) {
  auto sizes = like.sizes().vec();
  sizes.back() = rows.size(-1);
  return rows.view(sizes);
}

/// What backward needs beside the inputs, in the order it is saved.
struct Kept {
  at::Tensor sum, rstd;  ///< what stands in front of the product is computed from these again
  at::Tensor gathered;   ///< sequence parallelism: the product's input, which would cost communication to make again
  std::vector<at::Tensor> low, b, mask;  ///< per adapter: A x; B, scaled and expanded when parts are fused; dropout
};

struct Linear : torch::autograd::Function<Linear> {
  static variable_list forward(AutogradContext* context, at::TensorList defined, const LinearPlan* plan_pointer,
                               const Edges* edges) {
    const at::AutoDispatchBelowADInplaceOrView below;  // a microsecond less an operation
    const auto& plan = *plan_pointer;
    variable_list inputs;
    for (const auto edge : *edges) inputs.push_back(edge < 0 ? at::Tensor() : defined[edge]);
    Kept kept;
    kept.sum = inputs[kX];
    at::Tensor input;
    switch (plan.prologue) {
      case LinearPlan::Prologue::kNorm: {
        auto norm = rms_norm_forward(inputs[kX], inputs[kDelta], inputs[kNormWeight], plan.norm);
        if (inputs[kDelta].defined()) kept.sum = norm.sum;
        kept.rstd = norm.rstd;
        input = norm.normed;
        break;
      }
      case LinearPlan::Prologue::kGated:
        input = gated_activation_forward(inputs[kX], plan.activation);
        break;
      default:
        input = inputs[kX];
    }
    if (plan.column && plan.sequence_parallel && plan.group.size() > 1) {
      input = plan.group.all_gather(input);
      kept.gathered = input;
    }

    const auto x = matrix(input);
    const auto& weight = inputs[kWeight];
    // FP8 finds the scale of its input on the way to y, and ranks exchange what they are planned to.
    const bool unused = plan.unused && !plan.fp8 && plan.group.size() == 1;
    at::Tensor y;
    if (unused) y = at::zeros({1, 1}, x.options()).expand({x.size(0), weight.size(0)});
    for (size_t i = 0; i < plan.adapters.size(); ++i) {
      const auto& adapter = plan.adapters[i];
      auto seen = x;
      kept.mask.emplace_back();
      if (adapter.dropout > 0) std::tie(seen, kept.mask.back()) = at::native_dropout(x, adapter.dropout, true);
      kept.low.push_back(at::mm(seen, inputs[kAdapters + 2 * i].t()));
      const auto& b = inputs[kAdapters + 2 * i + 1];
      const bool fused = adapter.parts.size() > 1;
      kept.b.push_back(fused ? expand_b(b, adapter.parts, plan.layout, adapter.scaling) : b);
      const double scaling = fused ? 1 : adapter.scaling;
      if (unused) continue;
      if (y.defined()) {
        y.addmm_(kept.low[i], kept.b[i].t(), 1, scaling);
      } else {
        y = plan.fp8 ? plan.fp8->product(x, weight.size(0)) : at::Tensor();
        y = y.defined() ? at::addmm_out(y, y, kept.low[i], kept.b[i].t(), 0, scaling)
                        : product(kept.low[i], kept.b[i].t(), scaling);
      }
    }
    const auto& bias = inputs[kBias];
    at::Tensor amax;
    if (plan.fp8) {
      y = plan.fp8->forward(x, weight, y, &amax);
      if (plan.column && bias.defined()) y.add_(bias);
    } else if (unused) {
    } else if (y.defined()) {  // the big product accumulates onto the small one
      y.addmm_(x, weight.t());
      if (plan.column && bias.defined()) y.add_(bias);
    } else {
      y = plan.column && bias.defined() ? at::addmm(bias, x, weight.t()) : at::mm(x, weight.t());
    }
    y = shaped(y, input);
    if (!plan.column && !unused) {
      if (plan.sequence_parallel && plan.group.size() > 1) {
        y = plan.group.reduce_scatter(y);
      } else {
        plan.group.all_reduce(y);
      }
      if (bias.defined()) y = y.add_(bias);
    }

    variable_list saved{kept.sum, kept.rstd, kept.gathered, weight, inputs[kNormWeight]};
    for (size_t i = 0; i < plan.adapters.size(); ++i) {
      for (const auto& tensor : {inputs[kAdapters + 2 * i], kept.low[i], kept.b[i], kept.mask[i]})
        saved.push_back(tensor);
    }
    context->save_for_backward(std::move(saved));
    auto holder = c10::make_intrusive<Holder>();
    holder->plan = plan;
    holder->edges = *edges;
    holder->amax = amax;
    for (size_t slot = 0; slot < inputs.size(); ++slot) {
      const bool matrix = slot == kWeight || slot >= kAdapters;
      holder->main.push_back(matrix ? main_gradient(inputs[slot]) : nullptr);
    }
    context->saved_data["plan"] = at::IValue::make_capsule(std::move(holder));
    context->set_materialize_grads(false);
    if (plan.prologue != LinearPlan::Prologue::kNorm) return {y};
    return {y, kept.sum};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto capsule = context->saved_data["plan"].toCapsule();
    const auto* holder = static_cast<const Holder*>(capsule.get());
    const auto& plan = holder->plan;
    const auto& edges = holder->edges;
    const auto saved = context->get_saved_variables();
    const auto &sum = saved[0], &rstd = saved[1], &gathered = saved[2], &weight = saved[3], &norm_weight = saved[4];
    auto wants = [&](size_t slot) { return edges[slot] >= 0 && context->needs_input_grad(edges[slot]); };
    const auto grad_sum = grads.size() > 1 ? grads[1] : at::Tensor();
    variable_list result(edges.size());
    auto by_edge = [&] {
      variable_list ordered;
      for (size_t slot = 0; slot < edges.size(); ++slot)
        if (edges[slot] >= 0) ordered.push_back(result[slot]);
      ordered.resize(ordered.size() + 2);  // the plan and the edges
      return ordered;
    };
    if (!grads[0].defined()) {
      for (const auto slot : {kX, kDelta})
        if (wants(slot)) result[slot] = grad_sum;
      return by_edge();
    }
    const bool scattered = plan.sequence_parallel && plan.group.size() > 1;
    auto grad = grads[0];
    if (wants(kBias)) result[kBias] = matrix(grad).sum(0);  // a row-parallel bias was added behind the reduction
    if (!plan.column && scattered) grad = plan.group.all_gather(grad.contiguous());
    const auto grad_y = matrix(grad);

    // Down to the product's input.
    const bool norm = plan.prologue == LinearPlan::Prologue::kNorm,
               gated = plan.prologue == LinearPlan::Prologue::kGated;
    const bool wants_x = wants(kX) || wants(kDelta), wants_input = wants_x || wants(kNormWeight);
    std::vector<at::Tensor> grad_low;
    at::Tensor grad_input;
    bool wants_a = false;
    Fp8Pair grad_fp8;
    if (plan.fp8 && (wants_input || wants(kWeight))) grad_fp8 = plan.fp8->gradient(grad_y, wants_input, wants(kWeight));
    auto low_product = [&](const at::Tensor& low, const at::Tensor& a) {
      if (!plan.fp8) return at::mm(low, a);
      auto to = plan.fp8->product(low, a.size(1));
      return at::mm_out(to, low, a);
    };
    for (size_t i = 0; i < plan.adapters.size(); ++i) {
      const auto a_slot = kAdapters + 2 * i;
      const auto &a = saved[5 + 4 * i], &low = saved[6 + 4 * i], &b = saved[7 + 4 * i], &mask = saved[8 + 4 * i];
      wants_a = wants_a || wants(a_slot);
      if (wants(a_slot + 1)) result[a_slot + 1] = holder->b_gradient(a_slot + 1, grad_y, low, i);
      grad_low.emplace_back();
      if (wants(a_slot) || wants_input)
        grad_low[i] = product(grad_y, b, plan.adapters[i].parts.size() > 1 ? 1 : plan.adapters[i].scaling);
      if (!wants_input) continue;
      if (mask.defined()) {
        const auto seen = at::native_dropout_backward(at::mm(grad_low[i], a), mask, 1 / (1 - plan.adapters[i].dropout));
        grad_input = grad_input.defined() ? grad_input.add_(seen) : seen;
      } else {
        grad_input = grad_input.defined() ? grad_input.addmm_(grad_low[i], a) : low_product(grad_low[i], a);
      }
    }
    if (wants_input) {
      if (plan.fp8) {
        grad_input =
            plan.fp8->input_gradient(grad_fp8.straight, grad_y.size(0), grad_y.scalar_type(), weight, grad_input);
        grad_fp8.straight = {};
      } else {
        grad_input = grad_input.defined() ? grad_input.addmm_(grad_y, weight) : at::mm(grad_y, weight);
      }
      auto sizes = grad.sizes().vec();
      sizes.back() = weight.size(1);
      grad_input = grad_input.view(sizes);
      if (plan.column && scattered) {
        grad_input = plan.group.reduce_scatter(grad_input);
      } else if (plan.column) {
        plan.group.all_reduce(grad_input);
      }
    }

    // Through what stands in front, whose result comes back for the weights' gradients.
    const bool wants_weights = wants(kWeight) || wants_a, again = wants_weights && !gathered.defined();
    at::Tensor input = gathered;
    if (norm && wants_input) {
      auto back = rms_norm_backward(grad_input, sum, rstd, norm_weight, grad_sum, plan.norm, wants(kNormWeight), again);
      if (again) input = back.normed;
      result[kNormWeight] = back.weight;
      grad_input = back.x;
    } else if (norm && again) {
      input = rms_norm_apply(sum, rstd, norm_weight, plan.norm);
    } else if (gated && wants_input) {
      auto back = gated_activation_backward(grad_input, sum, plan.activation, again);
      if (again) input = back.out;
      grad_input = back.x;
    } else if (gated && again) {
      input = gated_activation_forward(sum, plan.activation);
    } else if (again) {
      input = sum;
    }
    if (wants(kX)) result[kX] = grad_input;
    if (wants(kDelta)) result[kDelta] = grad_input;
    if (!wants_weights) return by_edge();

    const auto x = matrix(input);
    if (wants(kWeight) && plan.fp8) {
      result[kWeight] = holder->weight_gradient(weight, grad_fp8.turned, plan.fp8->turned_input(x, holder->amax));
    } else if (wants(kWeight)) {
      result[kWeight] = holder->weight_gradient(kWeight, weight, grad_y, x);
    }
    for (size_t i = 0; i < plan.adapters.size(); ++i) {
      if (!wants(kAdapters + 2 * i)) continue;
      const auto& mask = saved[8 + 4 * i];
      const auto seen = mask.defined() ? at::native_dropout_backward(x, mask, 1 / (1 - plan.adapters[i].dropout)) : x;
      result[kAdapters + 2 * i] = holder->weight_gradient(kAdapters + 2 * i, saved[5 + 4 * i], grad_low[i], seen);
    }
    return by_edge();
  }
};

}  // namespace

LinearOutput linear(const LinearPlan& plan, const LinearTensors& tensors) {
  variable_list inputs{tensors.x_sbh, tensors.delta, tensors.weight, tensors.bias, tensors.norm_weight};
  for (size_t i = 0; i < plan.adapters.size(); ++i) {
    inputs.push_back(tensors.a[i]);
    inputs.push_back(tensors.b[i]);
  }
  Edges edges;
  variable_list defined;
  for (const auto& input : inputs) {
    edges.push_back(input.defined() ? static_cast<int>(defined.size()) : -1);
    if (input.defined()) defined.push_back(input);
  }
  auto outputs = Linear::apply(at::TensorList(defined), &plan, &edges);
  return {outputs[0], outputs.size() > 1 ? outputs[1] : at::Tensor()};
}

namespace {

struct BHolder : torch::CustomClassHolder {
  std::vector<bool> parts;
  PartLayout layout;
  double scaling = 1;
};

struct ExpandB : torch::autograd::Function<ExpandB> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& b, const std::vector<bool>* parts,
                            const PartLayout* layout, double scaling) {
    auto holder = c10::make_intrusive<BHolder>();
    holder->parts = *parts;
    holder->layout = *layout;
    holder->scaling = scaling;
    context->saved_data["holder"] = at::IValue::make_capsule(std::move(holder));
    return expand_b(b, *parts, *layout, scaling);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto capsule = context->saved_data["holder"].toCapsule();
    const auto* holder = static_cast<const BHolder*>(capsule.get());
    const auto& grad = grads[0];
    const auto r = grad.size(1) / std::count(holder->parts.begin(), holder->parts.end(), true);
    const auto to = at::empty({adapted_rows(holder->parts, holder->layout), r}, grad.options());
    collect_b(grad.contiguous(), to, holder->parts, holder->layout, holder->scaling, false);
    return {to, Variable(), Variable(), Variable()};
  }
};

}  // namespace

at::Tensor expanded_b(const at::Tensor& b, const std::vector<bool>& parts, const PartLayout& layout, double scaling) {
  return ExpandB::apply(b, &parts, &layout, scaling);
}

}  // namespace mcore_bridge
