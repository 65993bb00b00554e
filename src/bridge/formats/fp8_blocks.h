// Blockwise FP8 (bridge/formats/fp8.h) of whole tensors, on the device they are on.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "models/fp8_scales.h"
#include "parallel/group.h"
#include "plan/plan.h"

namespace mcore_bridge {

/// Numbers of blocks: a value is round(value * factor), and stands for that times scale.
struct Fp8Blocks {
  at::Tensor scale;   ///< float; as `amax` where that is not finite
  at::Tensor factor;  ///< float; 0 where the block becomes zeros
};

/// `amax`: float, the blocks' largest magnitudes. A block keeps its `known` scale (float, 0 for none) where `changed`
/// is 0. New scales are numbers that a file has in `dtype`.
Fp8Blocks fp8_blocks(const at::Tensor& amax, const at::Tensor& known, const at::Tensor& changed, c10::ScalarType dtype);

/// Whether a tensor of the checkpoint is one that becomes codes.
bool is_fp8_weight(const HfTensor& tensor);

struct Fp8Weight {
  at::Tensor codes;  ///< float8_e4m3fn, of the weight's shape
  at::Tensor scale;  ///< [block rows, block columns]
};

/// Makes of whole weights what save_weights(quantization="fp8") writes of them, one after the other.
class Fp8WholeWeights {
 public:
  /// `known`: of the checkpoint the model was loaded from, each rank of `group` those of its own parts. Collective.
  Fp8WholeWeights(const std::vector<HfTensor>& tensors, const Fp8ScalesByName& known, const Group& group);
  /// NonFiniteError names a weight that cannot be quantised.
  Fp8Weight quantize(const std::string& name, const at::Tensor& weight) const;

 private:
  Fp8ScalesByName known_;  ///< of all ranks
};

}  // namespace mcore_bridge
