#include "layers/attention/ring.h"

#include <ATen/ATen.h>

#include "layers/attention/plan_holder.h"
#include "layers/given.h"
#include "parallel/travelling.h"

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct Ring : Function<Ring> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& sinks, const ContextPlanPtr* plan, bool window) {
    const auto& group = (*plan)->group;
    const auto& steps = (*plan)->tiles(window);
    auto sum = PartialAttention::none(q);
    Travelling kv(group, at::stack({k, v}));
    for (size_t step = 0; step < steps.size(); ++step) {
      const bool last = step + 1 == steps.size();
      if (!last) kv.send();
      attend(sum, q, kv.here()[0], kv.here()[1], steps[step]);
      if (!last) kv.arrive();
    }
    if (sinks) attend_to_sinks(sum, *sinks);
    const auto out = sum.out.to(q.scalar_type());
    keep_plan(context, *plan, window);
    context->save_for_backward({q, k, v, out, sum.log_sum, sinks.value_or(at::Tensor())});
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto& kept = kept_plan(context);
    const auto& group = kept.plan->group;
    const auto& steps = kept.plan->tiles(kept.window);
    const auto saved = context->get_saved_variables();
    const AttentionGradient whole{saved[0], saved[3], saved[4], grads[0]};
    const auto sums = saved[4].options();
    auto dq = at::zeros(saved[0].sizes(), sums);
    Travelling kv(group, at::stack({saved[1], saved[2]}));
    // The gradient of a rank's keys follows them around, one step behind, and comes home after the last.
    Travelling dkv(group);
    for (size_t step = 0; step < steps.size(); ++step) {
      const bool last = step + 1 == steps.size();
      if (!last) kv.send();
      auto share = at::zeros(kv.here().sizes(), sums);
      auto dk = share[0], dv = share[1];
      attend_backward(whole, kv.here()[0], kv.here()[1], steps[step], dq, dk, dv);
      if (step > 0) {
        dkv.arrive();
        share.add_(dkv.here());
      }
      if (!last) kv.arrive();
      dkv.send(share);
    }
    dkv.arrive();
    const auto type = saved[1].scalar_type();
    return {dq.to(saved[0].scalar_type()),
            dkv.here()[0].to(type),
            dkv.here()[1].to(type),
            saved[5].defined() ? sinks_gradient(whole, saved[5]) : Variable(),
            Variable(),
            Variable()};
  }
};

}  // namespace

at::Tensor ring_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const ContextPlanPtr& plan,
                          bool window, const at::Tensor& sinks) {
  return Ring::apply(q, k, v, given(sinks), &plan, window);
}

}  // namespace mcore_bridge
