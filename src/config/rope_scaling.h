// RoPE frequencies of every scaling kind Hugging Face configs name.
#pragma once

#include <cstdint>
#include <vector>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

struct RopeFrequencies {
  std::vector<float> inv_freq;   ///< one per rotated pair
  double attention_scaling = 1;  ///< multiplies cos and sin
};

/// `seq_len`: the current length; only `dynamic` and `longrope` look at it.
RopeFrequencies rope_frequencies(const ModelConfig& config, int64_t seq_len);
bool rope_depends_on_length(const ModelConfig& config);

}  // namespace mcore_bridge
