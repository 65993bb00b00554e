// Activation recomputation: keep a block's inputs, run the block again in backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace mcore_bridge {

/// f(x), without keeping what f computes in between. Backward runs f again, with the random numbers of the first time
/// (so dropout draws alike), and differentiates it. Something in `x` must require gradients; parameters inside f
/// accumulate as usual.
std::vector<at::Tensor> recompute(std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)> f,
                                  const std::vector<at::Tensor>& x);
at::Tensor recompute(std::function<at::Tensor(const at::Tensor&)> f, const at::Tensor& x);

/// Whether the innermost block runs for the second time: nobody reads what it returns, only its graph matters.
bool recomputing();

}  // namespace mcore_bridge
