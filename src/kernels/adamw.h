// AdamW (https://arxiv.org/abs/1711.05101) of many tensors in one pass over their memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace mcore_bridge {

/// Lists of equal length; tensors of one entry have equally many elements and are contiguous.
struct AdamWTensors {
  std::vector<at::Tensor> masters, grads, exp_avgs, exp_avg_sqs;  ///< fp32; on a GPU any may be bf16, or any fp16,
                                                                  ///< or a master what its bf16 parameter lacks,
                                                                  ///< int16 (kernels/param_remainder.h)
  std::vector<at::Tensor>
      parameters;  ///< what models compute with, written from the master; undefined: the master is it
};

struct AdamWScalars {
  double lr = 0, beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0;
};

/// Whether fused_adamw takes one entry's master, gradient, moments and parameter in the precisions they have.
bool fused_adamw_takes(const std::vector<at::Tensor>& entry);

/// One update. Device scalars in fp32, so that the host does not wait: `grad_scale` divides gradients (clipping),
/// `skip` 1 leaves everything as it is, `step` counts this update (1 for the first).
void fused_adamw(const AdamWTensors& tensors, const AdamWScalars& scalars, const at::Tensor& grad_scale,
                 const at::Tensor& skip, const at::Tensor& step);

}  // namespace mcore_bridge
