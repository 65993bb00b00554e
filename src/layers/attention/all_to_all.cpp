#include "layers/attention/all_to_all.h"

#include <ATen/ATen.h>

#include "layers/attention/plan_holder.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor to_heads(const at::Tensor& x, const ContextPlan& plan) {
  const auto cp = plan.group.size();
  const auto by_rank = x.view({x.size(0), x.size(1), cp, x.size(2) / cp, x.size(3)}).permute({2, 0, 1, 3, 4});
  return plan.group.all_to_all(by_rank).flatten(0, 1).index_select(0, plan.natural);
}

at::Tensor to_sequence(const at::Tensor& x, const ContextPlan& plan) {
  const auto cp = plan.group.size();
  const auto by_rank = x.index_select(0, plan.rank_major).unflatten(0, {cp, x.size(0) / cp});
  return plan.group.all_to_all(by_rank).permute({1, 2, 0, 3, 4}).flatten(2, 3);
}

using Way = at::Tensor (*)(const at::Tensor&, const ContextPlan&);

template <Way kForward, Way kBackward>
struct Swap : Function<Swap<kForward, kBackward>> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const ContextPlanPtr* plan) {
    keep_plan(context, *plan, false);
    return kForward(x.contiguous(), **plan);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    return {kBackward(grads[0].contiguous(), *kept_plan(context).plan), Variable()};
  }
};

}  // namespace

at::Tensor sequence_to_heads(const at::Tensor& x, const ContextPlanPtr& plan) {
  return Swap<to_heads, to_sequence>::apply(x, &plan);
}

at::Tensor heads_to_sequence(const at::Tensor& x, const ContextPlanPtr& plan) {
  return Swap<to_sequence, to_heads>::apply(x, &plan);
}

}  // namespace mcore_bridge
