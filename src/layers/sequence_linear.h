// Linear layers between sequence-parallel shards, as one autograd node each with their communication.
//
// x_sbh: [s, b, features]; shards hold s / tp of dim 0.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "layers/fp8_linear.h"
#include "parallel/group.h"

namespace mcore_bridge {

/// gather(x) W^T + bias: x [s / tp, b, in] -> [s, b, out]. Keeps x, not what was gathered: backward gathers again for
/// W's gradient, beside the product that gives x's, which is reduce-scattered. `bias` may be undefined. `overlap`: the
/// exchanges run in blocks beside the products (overlapped_matmul.h).
at::Tensor gathered_linear(const at::Tensor& x_sbh, const at::Tensor& weight, const at::Tensor& bias, const Group& tp,
                           bool overlap, std::shared_ptr<Fp8Linear> fp8 = {});

/// reduce_scatter(x W^T + addend): x [s, b, in], addend [s, b, out] or undefined -> [s / tp, b, out].
at::Tensor scattered_linear(const at::Tensor& x_sbh, const at::Tensor& weight, const at::Tensor& addend,
                            const Group& tp, bool overlap, std::shared_ptr<Fp8Linear> fp8 = {});

}  // namespace mcore_bridge
