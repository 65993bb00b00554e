#include "kernels/param_remainder.h"

#include <ATen/ATen.h>

#include <limits>

namespace mcore_bridge {

// Halves of a float as 16-bit integers, the lower one first: the machines this runs on are little-endian. A lower half
// of 0x8000 and above is a negative integer, which shifted right becomes -1.

at::Tensor join_master(const at::Tensor& parameter, const at::Tensor& remainder) {
  const auto halves = at::empty({parameter.numel(), 2}, remainder.options());
  auto lower = halves.select(1, 0), upper = halves.select(1, 1);
  lower.copy_(remainder);
  at::add_out(upper, parameter.view(at::kShort), remainder.bitwise_right_shift(15));
  return halves.view(at::kFloat).view({-1});
}

void split_master(const at::Tensor& master, at::Tensor parameter, at::Tensor remainder) {
  // Of a NaN whose upper half says infinity, or that rounding would carry over the sign, nothing would be left.
  const auto values = at::where(master.isnan(), std::numeric_limits<float>::quiet_NaN(), master);
  const auto halves = values.view(at::kShort).view({-1, 2});
  remainder.copy_(halves.select(1, 0));
  auto upper = parameter.view(at::kShort);
  at::sub_out(upper, halves.select(1, 1), remainder.bitwise_right_shift(15));
}

}  // namespace mcore_bridge
