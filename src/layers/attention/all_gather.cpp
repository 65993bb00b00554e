#include "layers/attention/all_gather.h"

#include <ATen/ATen.h>

#include "layers/attention/plan_holder.h"
#include "layers/given.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// Keys and values of the whole row in natural order: [s * cp, 2, b, g, d].
at::Tensor gathered(const at::Tensor& k, const at::Tensor& v, const ContextPlan& plan) {
  const auto here = at::stack({k, v}, 1);
  return plan.natural.defined() ? plan.group.all_gather(here).index_select(0, plan.natural) : here;
}

struct AllGather : Function<AllGather> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& sinks, const ContextPlanPtr* plan, bool window) {
    const auto kv = gathered(k, v, **plan);
    auto sum = PartialAttention::none(q);
    attend(sum, q, kv.select(1, 0), kv.select(1, 1), (*plan)->tiles(window)[0]);
    if (sinks) attend_to_sinks(sum, *sinks);
    const auto out = sum.out.to(q.scalar_type());
    keep_plan(context, *plan, window);
    context->save_for_backward({q, k, v, out, sum.log_sum, sinks.value_or(at::Tensor())});
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto& kept = kept_plan(context);
    const auto& plan = *kept.plan;
    const auto saved = context->get_saved_variables();
    const AttentionGradient whole{saved[0], saved[3], saved[4], grads[0]};
    const auto kv = gathered(saved[1], saved[2], plan);
    const auto sums = saved[4].options();
    auto dq = at::zeros(saved[0].sizes(), sums);
    const auto dkv = at::zeros(kv.sizes(), sums);
    auto dk = dkv.select(1, 0), dv = dkv.select(1, 1);
    attend_backward(whole, kv.select(1, 0), kv.select(1, 1), plan.tiles(kept.window)[0], dq, dk, dv);
    const auto summed = plan.natural.defined() ? plan.group.reduce_scatter(dkv.index_select(0, plan.rank_major)) : dkv;
    const auto mine = summed.to(saved[1].scalar_type());
    return {dq.to(saved[0].scalar_type()),
            mine.select(1, 0),
            mine.select(1, 1),
            saved[5].defined() ? sinks_gradient(whole, saved[5]) : Variable(),
            Variable(),
            Variable()};
  }
};

}  // namespace

at::Tensor all_gather_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const ContextPlanPtr& plan, bool window, const at::Tensor& sinks) {
  return AllGather::apply(q, k, v, given(sinks), &plan, window);
}

}  // namespace mcore_bridge
