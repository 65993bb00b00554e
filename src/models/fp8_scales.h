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

/// Of the scales that are written where those loaded are `loaded`: what else there might be (E8M0) is written as float.
inline c10::ScalarType fp8_scale_dtype(c10::ScalarType loaded) {
  return loaded == c10::ScalarType::BFloat16 || loaded == c10::ScalarType::Half ? loaded : c10::ScalarType::Float;
}

/// By Hugging Face name of the weight.
using Fp8ScalesByName = std::map<std::string, Fp8Scales>;

}  // namespace mcore_bridge
