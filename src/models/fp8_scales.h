// What a model remembers of the blockwise FP8 checkpoint it was loaded from.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <map>
#include <string>

namespace mcore_bridge {

/// The scales of one weight's blocks of 128 x 128 as far as this rank read them. A block whose values are still what
/// its scale made of them is saved with it again, bit for bit as it was.
struct Fp8Scales {
  at::Tensor grid;  ///< [block rows, block columns] float, 0 where none was read; undefined when none was at all
  c10::ScalarType dtype = c10::ScalarType::Float;  ///< in the file
};

/// By Hugging Face name of the weight.
using Fp8ScalesByName = std::map<std::string, Fp8Scales>;

}  // namespace mcore_bridge
