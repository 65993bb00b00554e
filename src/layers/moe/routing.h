// From router logits to the experts of each token: pure functions of tensors, no parameters, no communication.
//
// Shapes: t tokens, E experts, k experts per token.
#pragma once

#include <ATen/core/Tensor.h>

namespace mcore_bridge {

struct RoutingOptions {
  int64_t experts = 0, topk = 2;
  bool sigmoid = false;     ///< score function: sigmoid, else softmax over all experts
  bool normalise = true;    ///< the chosen scores are divided by their sum (Megatron: no pre_softmax)
  double scaling = 1;       ///< multiplies the weights at the end
  int64_t groups = 0;       ///< group-limited choice: experts in `groups` equal groups, of which ...
  int64_t group_topk = 0;   ///< ... this many best ones take part; 0: all
  double smallest_sum = 0;  ///< the sum that normalises counts as at least this (ERNIE 4.5 moe_norm_min)
};

struct Routing {
  at::Tensor experts;  ///< int64 [t, k]; a dropped place holds E
  at::Tensor weights;  ///< [t, k] in the scores' dtype, differentiable
};

/// sigmoid(logits) or softmax(logits) over the experts [t, E].
at::Tensor router_scores(const at::Tensor& logits, const RoutingOptions& options);

/// The given experts, int64 [t, k], weighted by their scores.
Routing weighted_by_scores(const at::Tensor& scores, at::Tensor experts, const RoutingOptions& options);

/// The k best experts by `scores` (+ `bias` [E], which takes part in the choice only; may be undefined), int64 [t, k].
/// With groups, a group's score is the sum of its two best experts when there is a bias, else its best one.
/// Sources: DeepSeek-V2 (arXiv:2405.04434, device-limited routing), DeepSeek-V3 (arXiv:2412.19437, eq. 16).
at::Tensor best_experts(const at::Tensor& scores, const at::Tensor& bias, const RoutingOptions& options);

/// Balanced assignment by Sinkhorn iteration on the logits, int64 [t, k]. Source: arXiv:2202.01169, section 3.
at::Tensor sinkhorn_experts(const at::Tensor& logits, const RoutingOptions& options);

/// Place p goes to expert p mod E: an even load for benchmarks. int64 [t, k].
at::Tensor experts_in_turn(const at::Tensor& scores, const RoutingOptions& options);

/// Which places (bool [t, k]) exceed `capacity` tokens of their expert: those of the smallest weights (`by_weight`), or
/// the latest.
at::Tensor over_capacity(const at::Tensor& experts, const at::Tensor& weights, int64_t count, int64_t capacity,
                         bool by_weight);

/// How many places each of `count` experts was given, int64 [count]; other numbers do not count.
at::Tensor tokens_per_expert(const at::Tensor& experts, int64_t count);

/// Switch-Transformer balance loss of these tokens: E / (k * T^2) * sum_e f_e * sum_t score_te, where f [E] counts the
/// places and T the tokens that f was counted over (arXiv:2101.03961, eq. 4-6, with k choices). Scalar, differentiable
/// in `scores` (rows of this rank; f and T may cover more).
at::Tensor balance_loss(const at::Tensor& scores, const at::Tensor& f, double total_tokens, int64_t topk);

/// mean over T tokens of logsumexp(logits)^2 (arXiv:2202.08906, eq. 5); this rank's share of it.
at::Tensor z_loss(const at::Tensor& logits, double total_tokens);

/// `x` itself; backward also sends gradient `scale` into `loss`, so that it is minimised beside the main loss.
at::Tensor with_loss(const at::Tensor& x, const at::Tensor& loss, double scale);

}  // namespace mcore_bridge
