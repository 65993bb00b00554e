// FP8 codes of parts of weights: what a rank makes of its shard of a weight, when the magnitudes that scales come from
// are known to all ranks. Together the parts are, bit for bit, what fp8_quantize makes of the whole weight.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "kernels/cuda/fp8.h"

namespace mcore_bridge {

/// Elements [begin, begin + n) of a flattened weight.
struct Fp8Part {
  at::Tensor values, codes;  ///< [n] float, float8_e4m3fn
  int64_t begin = 0;
  int64_t columns = 0;  ///< of the weight
  int64_t first = 0;    ///< of the weight's magnitudes among all
  int64_t stride = 0;   ///< one for every 128 x 128: distance of a row of blocks to the next; 0: one for all
};

/// Raises `amax` (float) to the magnitudes of the values, rounded to `dtype`.
void fp8_raise_amax(const std::vector<Fp8Part>& parts, const at::Tensor& amax, at::ScalarType dtype);
/// Codes of those rounded values, scaled for the magnitudes.
void fp8_quantize(const std::vector<Fp8Part>& parts, const at::Tensor& amax, at::ScalarType dtype);

/// A weight's scales and where its magnitudes begin, one for each.
struct Fp8ScalePlace {
  at::Tensor scale;
  int64_t first = 0;
};
/// What the codes count.
void fp8_write_scales(const std::vector<Fp8ScalePlace>& places, const at::Tensor& amax);

}  // namespace mcore_bridge
