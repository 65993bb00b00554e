// An fp32 master as the bf16 number that the model computes with and the 16 bits that are missing there: 4 bytes for
// both instead of 6.
//
// The model's number is the master rounded to nearest, ties away from zero (to even would not tell on which side of a
// tie the master lies): it is the master's upper half, one more where the lower half is 0x8000 and above.
#pragma once

#include <ATen/core/Tensor.h>

namespace mcore_bridge {

/// The masters, in new memory. `parameter` bf16, `remainder` int16, both flat and of equal length.
at::Tensor join_master(const at::Tensor& parameter, const at::Tensor& remainder);

/// Writes `master` (fp32, flat) into both. NaN becomes NaN.
void split_master(const at::Tensor& master, at::Tensor parameter, at::Tensor remainder);

}  // namespace mcore_bridge
