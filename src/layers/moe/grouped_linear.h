// One matrix product per expert over rows sorted by expert.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace mcore_bridge {

/// Rows of each expert in a [n, ...] tensor sorted by expert. Rows after the last expert's belong to nobody (dropped
/// places, tokens of other ranks) and come out as zeros.
struct ExpertRows {
  at::Tensor ends;            ///< int32 [E], cumulative, on the device
  std::vector<int64_t> host;  ///< the same on the host; empty on a GPU where no step waits for the device
  bool tail = false;          ///< there may be rows after the last expert's
};

/// counts: int64 [E] on the device. On the CPU the host copy is made too.
ExpertRows expert_rows(const at::Tensor& counts, bool tail);

/// y[i] = W[e(i)] x[i] (+ bias[e(i)]): x [n, in], weight [E, out, in], bias [E, out] or undefined -> [n, out].
/// `adds_bias` false: another rank adds it, here it only gets a gradient of zeros.
/// GPU: libtorch's grouped GEMM (bf16, fp16); CPU and fp32: a loop over the experts that have rows. Weight gradients
/// can be put aside (layers/weight_gradients.h).
at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                          const ExpertRows& groups, bool adds_bias = true);

}  // namespace mcore_bridge
