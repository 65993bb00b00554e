// Saving a model with blockwise FP8 weights.
#pragma once

#include <memory>

#include "bridge/tensor_encoder.h"
#include "mcore_bridge/model_config.h"
#include "models/fp8_scales.h"

namespace mcore_bridge {

/// The weights is_quantized_weight() names become float8_e4m3fn and `_scale_inv`, blocks of 128 x 128; all others
/// `dtype`. `tensors`: the whole checkpoint, the same on all ranks. Blocks that a split cuts get one scale: ranks agree
/// on each block's largest magnitude first. Blocks that hold what was loaded with `known` scales keep them, which
/// makes their bytes what they were. `known` must live as long as the encoder.
std::unique_ptr<TensorEncoder> fp8_encoder(c10::ScalarType dtype, const std::vector<HfTensor>& tensors,
                                           const Fp8ScalesByName& known);

/// config.json's content for that checkpoint.
std::string fp8_config_text(const std::string& config, const std::vector<HfTensor>& tensors);

}  // namespace mcore_bridge
