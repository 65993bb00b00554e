// Ring attention: keys and values travel around the context-parallel ranks while each works on those at hand.
#pragma once

#include "layers/attention/context_plan.h"

namespace mcore_bridge {

/// q [s, b, n, d], k and v [s, b, g, d]: this rank's part of the sequence -> [s, b, n, d]. Collective over the plan's
/// group, and again in backward. Sends 2 (cp - 1) tensors of k's size forward; backward sends as many again and
/// 2 cp gradients of that size in fp32. `sinks` [n]: see attend_to_sinks.
at::Tensor ring_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const ContextPlanPtr& plan,
                          bool window, const at::Tensor& sinks = {});

}  // namespace mcore_bridge
