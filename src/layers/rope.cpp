#include "layers/rope.h"

#include <ATen/ATen.h>

#include "config/rope_scaling.h"

namespace mcore_bridge {

RotaryEmbedding::RotaryEmbedding(const ModelConfig& config, c10::Device device)
    : config_(config), device_(device), depends_on_length_(rope_depends_on_length(config)) {
  refresh(config.max_position_embeddings.value_or(0));
}

void RotaryEmbedding::refresh(int64_t length) {
  const auto frequencies = rope_frequencies(config_, length);
  inverse_frequencies_ = at::tensor(at::ArrayRef<float>(frequencies.inv_freq), at::kFloat).to(device_);
  attention_scaling_ = frequencies.attention_scaling;
  length_ = length;
}

RopeTable RotaryEmbedding::table(const at::Tensor& position_ids, int64_t length) {
  if (depends_on_length_ && length != length_) refresh(length);
  const auto angles =
      (position_ids.t().to(at::kFloat).unsqueeze(-1) * inverse_frequencies_).unsqueeze(2);  // [s, b, 1, d/2]
  auto cos = angles.cos(), sin = angles.sin();
  if (attention_scaling_ != 1) {
    cos = cos * attention_scaling_;
    sin = sin * attention_scaling_;
  }
  return {cos.to(config_.params_dtype), sin.to(config_.params_dtype)};
}

}  // namespace mcore_bridge
