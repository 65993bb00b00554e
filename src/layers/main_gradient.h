// Where training keeps a parameter's gradient, so that a layer's backward adds to it directly: the weight-gradient
// product accumulates into it, in fp32 also for low-precision parameters, and no gradient exists in between.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>

namespace mcore_bridge {

struct MainGradient {
  at::Tensor grad;     ///< the parameter's shape; fp32 unless main_grads_dtype says otherwise
  bool fresh = true;   ///< holds nothing yet: the next contribution overwrites it
  bool added = false;  ///< a layer has added to it since this was last looked at
  bool fixed = false;  ///< its address is recorded somewhere: it stays where it is
};

/// From now on layers add the parameter's gradient to `gradient` and return none to autograd, whose post-accumulate
/// hook still runs once all contributions of a backward pass are there. The owner sets `fresh` at the start of a step.
void set_main_gradient(const at::Tensor& parameter, std::shared_ptr<MainGradient> gradient);
/// Takes it away again, unless another has taken its place.
void clear_main_gradient(const at::Tensor& parameter, const std::shared_ptr<MainGradient>& gradient);
/// Null when training keeps none (loops of one's own): the layer returns its gradient to autograd.
std::shared_ptr<MainGradient> main_gradient(const at::Tensor& parameter);

/// One contribution: `into`(gradient, whether to add to it or to overwrite). Nothing in backward reads a main gradient,
/// so while a graph is recorded it need not be there before backward goes on (kernels/cuda/graph.h: run_beside).
void contribute(MainGradient& main, std::function<void(const at::Tensor&, bool accumulate)> into);

/// Puts a gradient that exists already into the main one. One that is overwritten takes the other's memory instead of
/// its numbers where each has a storage to itself, as the large matrices do.
void settle(const MainGradient& main, at::Tensor gradient, bool accumulate);

/// sum (+)= scaling * a^T b, accumulated in sum's dtype, which may be wider than a's and b's. Rows are summed over: a
/// [n, p], b [n, q].
void accumulate_product(at::Tensor sum, const at::Tensor& a, const at::Tensor& b, bool accumulate, double scaling = 1);

}  // namespace mcore_bridge
