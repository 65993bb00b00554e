// The products of a linear layer with its adapters: y = x W^T + sum of scaling * (x A^T) B^T, and the way back to x.
//
// Where the rows of x and of W have room behind them (kernels/room.h), A x and B go there and y is one product:
// [x | A x] [W | scaling * B]^T. Else the adapter's product comes first and the large one accumulates onto it; of few
// rows on a GPU A x is made beside x W^T while a graph is recorded, and B's product comes last.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "kernels/fp8.h"

namespace mcore_bridge {

struct LinearPlan;

struct AdaptedProduct {
  at::Tensor y;
  at::Tensor amax;  ///< FP8: what the input was scaled for
  /// Of each adapter, what backward needs: A x; B as the product saw it; the dropout's mask; and what B there has not
  /// been multiplied with.
  std::vector<at::Tensor> low, b, mask;
  std::vector<double> scaling;
};

/// x [rows, in], which has `room` behind its rows; bias may be undefined. `unused`: y is zeros, see LinearPlan.
AdaptedProduct adapted_product(const LinearPlan& plan, const at::Tensor& x, int64_t room, const at::Tensor& weight,
                               const at::Tensor& bias, const std::vector<at::Tensor>& a,
                               const std::vector<at::Tensor>& b, bool unused);

struct AdaptedGradient {
  at::Tensor x;                 ///< dy W + sum of low A
  std::vector<at::Tensor> low;  ///< of each adapter, scaling * dy B
};

/// The gradient of x for `grad_y` [rows, out], with what forward has kept. `grad_fp8`: grad_y as FP8 multiplies it.
AdaptedGradient adapted_input_gradient(const LinearPlan& plan, const at::Tensor& grad_y, const Fp8Matrix& grad_fp8,
                                       const at::Tensor& weight, const std::vector<at::Tensor>& a,
                                       const std::vector<at::Tensor>& b, const std::vector<at::Tensor>& mask,
                                       const std::vector<double>& scaling);

/// scaling * a b.
at::Tensor scaled_product(const at::Tensor& a, const at::Tensor& b, double scaling);

/// The room that x should have: what waits behind W's rows, when the plan's only adapter fits into it. 0: none.
int64_t product_room(const LinearPlan& plan, const at::Tensor& weight, const std::vector<at::Tensor>& a);

}  // namespace mcore_bridge
