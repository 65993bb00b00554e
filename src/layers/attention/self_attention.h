// Self-attention with grouped key/value heads.
#pragma once

#include <memory>

#include "layers/attention/core_attention.h"
#include "layers/attention/whole_qk_norm.h"
#include "layers/linear.h"
#include "layers/module.h"
#include "layers/norm.h"

namespace mcore_bridge {

class SelfAttention : public Module {
 public:
  SelfAttention(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options, int64_t layer);
  std::string kind() const override { return "SelfAttention"; }
  std::vector<Child> children() const override;
  /// core_attention.softmax_offset [heads of this rank] with attention sinks.
  std::vector<NamedParameter> own_parameters() const override;
  /// The block's output for norm(x), and x itself: see LinearOutput.
  LinearOutput forward(const at::Tensor& x_sbh, const AttentionInput& input);
  Footprint footprint(const ActivationShape& shape) const override;

 private:
  at::Tensor core(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionInput& input) const;
  /// The fused row as the split takes it: whole norms and clipping done.
  at::Tensor prepared(const at::Tensor& mixed) const;
  /// core with this rank's random numbers, and again in backward when asked to.
  at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionInput& input) const;

  ParallelStatePtr parallel_;
  HeadLayout local_;  ///< this rank's heads
  bool rope_, interleaved_, window_, chunks_, scales_queries_, recompute_core_;
  std::optional<double> clip_;
  double epsilon_;
  std::optional<WholeQkNormOptions> whole_norm_;
  at::Tensor sinks_;    ///< [heads]
  at::Tensor l2_norm_;  ///< ones [d]: heads are normalised without a weight
  CoreAttentionOptions core_;
  Transport transport_;
  std::unique_ptr<ParallelLinear> qkv_, proj_;
  std::unique_ptr<Norm> q_norm_, k_norm_;
};

}  // namespace mcore_bridge
