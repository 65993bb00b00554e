#include "layers/linear_function.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <memory>

#include "layers/adapted_product.h"
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
  std::vector<double> scaling;                      ///< of each adapter, what the kept B lacks

  /// The gradient of the weight from quantised matrices, as weight_gradient gives it.
  at::Tensor weight_gradient(const at::Tensor& weight, const Fp8Matrix& dy, const Fp8Matrix& x) const {
    return fp8_weight_gradient(weight, main[kWeight], dy, x);
  }

  /// a^T b, the gradient of `parameter`: into the main gradient, or returned for autograd when there is none, or put
  /// aside.
  at::Tensor weight_gradient(size_t slot, const at::Tensor& parameter, const at::Tensor& a, const at::Tensor& b) const {
    return mcore_bridge::weight_gradient(parameter, main[slot], a, b);
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

at::Tensor matrix(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

at::Tensor shaped(const at::Tensor& rows, const at::Tensor& like) {
  auto sizes = like.sizes().vec();
  sizes.back() = rows.size(-1);
  return rows.view(sizes);
}

struct Linear : torch::autograd::Function<Linear> {
  static variable_list forward(AutogradContext* context, at::TensorList defined, const LinearPlan* plan_pointer,
                               const Edges* edges) {
    const at::AutoDispatchBelowADInplaceOrView below;  // a microsecond less an operation
    const auto& plan = *plan_pointer;
    variable_list inputs;
    for (const auto edge : *edges) inputs.push_back(edge < 0 ? at::Tensor() : defined[edge]);
    std::vector<at::Tensor> a, b;
    for (size_t i = 0; i < plan.adapters.size(); ++i) {
      a.push_back(inputs[kAdapters + 2 * i]);
      b.push_back(inputs[kAdapters + 2 * i + 1]);
    }
    const auto& weight = inputs[kWeight];
    // FP8 finds the scale of its input on the way to y, and ranks exchange what they are planned to.
    const bool unused = plan.unused && !plan.fp8 && plan.group.size() == 1;
    const bool made_here = plan.prologue != LinearPlan::Prologue::kNone;  // the product's input
    const auto room = made_here && !unused ? product_room(plan, weight, a) : 0;
    // Kept for backward: what stands in front of the product is computed from the first two again, and what came from
    // other ranks would cost communication to make again.
    auto sum = inputs[kX];
    at::Tensor rstd, gathered, input;
    switch (plan.prologue) {
      case LinearPlan::Prologue::kNorm: {
        auto norm = rms_norm_forward(inputs[kX], inputs[kDelta], inputs[kNormWeight], plan.norm, room);
        if (inputs[kDelta].defined()) sum = norm.sum;
        rstd = norm.rstd;
        input = norm.normed;
        break;
      }
      case LinearPlan::Prologue::kGated:
        input = gated_activation_forward(inputs[kX], plan.activation, room);
        break;
      default:
        input = inputs[kX];
    }
    if (plan.column && plan.sequence_parallel && plan.group.size() > 1) {
      input = plan.group.all_gather(input);
      gathered = input;
    }

    const auto x = room > 0 ? input.view({-1, input.size(-1)}) : matrix(input);
    const auto& bias = inputs[kBias];
    const auto product = adapted_product(plan, x, room, weight, bias, a, b, unused);
    auto y = shaped(product.y, input);
    if (!plan.column && !unused) {
      if (plan.sequence_parallel && plan.group.size() > 1) {
        y = plan.group.reduce_scatter(y);
      } else {
        plan.group.all_reduce(y);
      }
      if (bias.defined()) y = y.add_(bias);
    }

    variable_list saved{sum, rstd, gathered, weight, inputs[kNormWeight]};
    for (size_t i = 0; i < plan.adapters.size(); ++i) {
      for (const auto& tensor : {a[i], product.low[i], product.b[i], product.mask[i]}) saved.push_back(tensor);
    }
    context->save_for_backward(std::move(saved));
    auto holder = c10::make_intrusive<Holder>();
    holder->plan = plan;
    holder->edges = *edges;
    holder->amax = product.amax;
    holder->scaling = product.scaling;
    for (size_t slot = 0; slot < inputs.size(); ++slot) {
      const bool matrix = slot == kWeight || slot >= kAdapters;
      holder->main.push_back(matrix ? main_gradient(inputs[slot]) : nullptr);
    }
    context->saved_data["plan"] = at::IValue::make_capsule(std::move(holder));
    context->set_materialize_grads(false);
    if (plan.prologue != LinearPlan::Prologue::kNorm) return {y};
    return {y, sum};
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
    std::vector<at::Tensor> a, b, mask;
    for (size_t i = 0; i < plan.adapters.size(); ++i) {
      const auto a_slot = kAdapters + 2 * i;
      a.push_back(saved[5 + 4 * i]);
      b.push_back(saved[7 + 4 * i]);
      mask.push_back(saved[8 + 4 * i]);
      wants_a = wants_a || wants(a_slot);
      if (wants(a_slot + 1)) result[a_slot + 1] = holder->b_gradient(a_slot + 1, grad_y, saved[6 + 4 * i], i);
      if (!wants_input)
        grad_low.push_back(wants(a_slot) ? scaled_product(grad_y, b[i], holder->scaling[i]) : at::Tensor());
    }
    if (wants_input) {
      auto gradient = adapted_input_gradient(plan, grad_y, grad_fp8.straight, weight, a, b, mask, holder->scaling);
      grad_fp8.straight = {};
      grad_low = std::move(gradient.low);
      grad_input = std::move(gradient.x);
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
      const auto seen =
          mask[i].defined() ? at::native_dropout_backward(x, mask[i], 1 / (1 - plan.adapters[i].dropout)) : x;
      result[kAdapters + 2 * i] = holder->weight_gradient(kAdapters + 2 * i, a[i], grad_low[i], seen);
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
