// Context-parallel attention that collects the keys and values of all ranks.
#pragma once

#include "layers/attention/context_plan.h"

namespace mcore_bridge {

/// As ring_attention. Gathers k and v (in backward again, instead of keeping them) and reduce-scatters their gradients
/// in fp32.
at::Tensor all_gather_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const ContextPlanPtr& plan, bool window, const at::Tensor& sinks = {});

}  // namespace mcore_bridge
