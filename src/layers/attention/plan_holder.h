// A context plan as autograd contexts keep it.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "layers/attention/context_plan.h"

namespace mcore_bridge {

struct PlanHolder : torch::CustomClassHolder {
  ContextPlanPtr plan;
  bool window;
  PlanHolder(ContextPlanPtr p, bool w) : plan(std::move(p)), window(w) {}
};

inline void keep_plan(torch::autograd::AutogradContext* context, const ContextPlanPtr& plan, bool window) {
  context->saved_data["plan"] = at::IValue::make_capsule(c10::make_intrusive<PlanHolder>(plan, window));
}
inline const PlanHolder& kept_plan(torch::autograd::AutogradContext* context) {
  return *static_cast<const PlanHolder*>(context->saved_data["plan"].toCapsule().get());
}

}  // namespace mcore_bridge
