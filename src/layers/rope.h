// Rotary position embedding.
#pragma once

#include <ATen/core/Tensor.h>

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

/// cos and sin of every position's angles, [s, b or 1, 1, rotated / 2], in the activations' dtype.
struct RopeTable {
  at::Tensor cos, sin;
};

class RotaryEmbedding {
 public:
  RotaryEmbedding(const ModelConfig& config, c10::Device device);
  /// `position_ids`: [b, s]; `length`: longest sequence now (only kinds that depend on it look at it).
  RopeTable table(const at::Tensor& position_ids, int64_t length);
  int64_t rotated() const { return 2 * inverse_frequencies_.numel(); }  ///< entries of a head that rotate

 private:
  void refresh(int64_t length);
  ModelConfig config_;
  c10::Device device_;
  at::Tensor inverse_frequencies_;  ///< fp32 [rotated / 2]
  double attention_scaling_ = 1;
  bool depends_on_length_;
  int64_t length_ = -1;
};

}  // namespace mcore_bridge
