// Self-attention with grouped key/value heads over libtorch's fused kernels.
//
// Shapes: s sequence, b batch, t packed tokens (b == 1), n heads, d head width.
#pragma once

#include <memory>
#include <optional>

#include "layers/linear.h"
#include "layers/module.h"
#include "layers/norm.h"
#include "layers/rope.h"
#include "mcore_bridge/model.h"

namespace mcore_bridge {

/// What every attention layer of one forward shares: made once a micro-batch.
struct AttentionInput {
  RopeTable rope;
  std::optional<PackedSeqParams> packed;
  /// bool [b, 1, s, s], true = attend; undefined when causality alone decides. Index 1: with the sliding window.
  at::Tensor allowed, allowed_in_window;
};

/// Window of keys to the left (tokens besides the own one); -1: unbounded.
struct CoreAttentionOptions {
  int64_t window_left = -1;
  double dropout = 0;
};

/// Causal attention. q [s, b, n, d], k and v [s, b, groups, d] -> [s, b, n * d]. `allowed` as in AttentionInput.
at::Tensor core_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& allowed,
                          const std::optional<PackedSeqParams>& packed, const CoreAttentionOptions& options,
                          bool training);

/// The mask of a causal (window_left >= 0: windowed) attention as bool [s, s].
at::Tensor causal_mask(int64_t length, int64_t window_left, c10::Device device);

class SelfAttention : public Module {
 public:
  SelfAttention(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options, int64_t layer);
  std::string kind() const override { return "SelfAttention"; }
  std::vector<Child> children() const override;
  at::Tensor forward(const at::Tensor& x_sbh, const AttentionInput& input);

 private:
  HeadLayout local_;  ///< this rank's heads
  bool rope_, interleaved_, window_;
  CoreAttentionOptions core_;
  std::unique_ptr<ParallelLinear> qkv_, proj_;
  std::unique_ptr<Norm> q_norm_, k_norm_;
};

}  // namespace mcore_bridge
