#include "layers/moe/routing.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>

namespace mcore_bridge {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// Scores of experts outside the best groups become -inf.
at::Tensor in_best_groups(const at::Tensor& choice, bool two_best, const RoutingOptions& options) {
  const auto t = choice.size(0), per_group = options.experts / options.groups;
  const auto grouped = choice.view({t, options.groups, per_group});
  const auto best = std::get<0>(grouped.topk(two_best ? std::min<int64_t>(2, per_group) : 1, -1)).sum(-1);
  const auto chosen = std::get<1>(best.topk(options.group_topk, -1, /*largest=*/true, /*sorted=*/false));
  const auto outside = at::ones_like(best, best.options().dtype(at::kBool)).scatter_(1, chosen, false);
  return grouped.masked_fill(outside.unsqueeze(-1), -std::numeric_limits<double>::infinity())
      .view({t, options.experts});
}

struct WithLoss : torch::autograd::Function<WithLoss> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& loss, double scale) {
    context->save_for_backward({loss});
    context->saved_data["scale"] = scale;
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    return {grads[0], at::full_like(context->get_saved_variables()[0], context->saved_data["scale"].toDouble()),
            Variable()};
  }
};

}  // namespace

at::Tensor router_scores(const at::Tensor& logits, const RoutingOptions& options) {
  return options.sigmoid ? logits.sigmoid() : logits.softmax(-1);
}

Routing weighted_by_scores(const at::Tensor& scores, at::Tensor experts, const RoutingOptions& options) {
  auto weights = scores.gather(1, experts);
  if (options.normalise) {
    const auto sum = weights.sum(-1, /*keepdim=*/true);
    weights = weights / (options.smallest_sum > 0 ? sum.clamp_min(options.smallest_sum) : sum + 1e-20);
  }
  if (options.scaling != 1) weights = weights * options.scaling;
  return {std::move(experts), std::move(weights)};
}

at::Tensor best_experts(const at::Tensor& scores, const at::Tensor& bias, const RoutingOptions& options) {
  at::NoGradGuard no_grad;
  auto choice = bias.defined() ? scores + bias : scores;
  if (options.group_topk > 0 && options.group_topk < options.groups)
    choice = in_best_groups(choice, bias.defined(), options);
  return std::get<1>(choice.topk(options.topk, -1));
}

at::Tensor sinkhorn_experts(const at::Tensor& logits, const RoutingOptions& options) {
  at::NoGradGuard no_grad;
  constexpr int kRounds = 30;  // a fixed number: no look at the device for convergence
  constexpr double kTiny = 1e-8;
  const auto cost = (logits - logits.amax(-1, true)).exp();
  auto rows = at::ones({cost.size(0)}, cost.options()), columns = at::ones({cost.size(1)}, cost.options());
  for (int round = 0; round < kRounds; ++round) {
    rows = 1.0 / (static_cast<double>(cost.size(0)) * (cost.matmul(columns) + kTiny));
    columns = 1.0 / (static_cast<double>(cost.size(1)) * (cost.t().matmul(rows) + kTiny));
  }
  return std::get<1>((columns * cost * rows.unsqueeze(1)).topk(options.topk, -1));
}

at::Tensor experts_in_turn(const at::Tensor& scores, const RoutingOptions& options) {
  const auto places = at::arange(scores.size(0) * options.topk, scores.options().dtype(at::kLong));
  return places.remainder(options.experts).view({scores.size(0), options.topk});
}

at::Tensor over_capacity(const at::Tensor& experts, const at::Tensor& weights, int64_t count, int64_t capacity,
                         bool by_weight) {
  at::NoGradGuard no_grad;
  const auto flat = experts.flatten();
  const auto positions = at::arange(flat.size(0), flat.options());
  // Places in order of preference, then stably by expert: a place's rank inside its expert decides.
  auto order = by_weight ? weights.detach().flatten().argsort(/*stable=*/true, 0, /*descending=*/true) : positions;
  order = order.index_select(0, flat.index_select(0, order).argsort(/*stable=*/true, 0, /*descending=*/false));
  const auto counts = tokens_per_expert(experts, count);
  const auto starts = counts.cumsum(0) - counts;
  const auto rank = positions - starts.index_select(0, flat.index_select(0, order));
  return at::empty_like(flat, flat.options().dtype(at::kBool))
      .index_copy_(0, order, rank.ge(capacity))
      .view_as(experts);
}

at::Tensor tokens_per_expert(const at::Tensor& experts, int64_t count) {
  // One more bin takes the other numbers. scatter_add_ needs no look at the device, unlike bincount.
  const auto flat = experts.flatten();
  const auto bin = flat.masked_fill(flat.lt(0).logical_or_(flat.gt(count)), count);
  return at::zeros({count + 1}, flat.options()).scatter_add_(0, bin, at::ones_like(flat)).narrow(0, 0, count);
}

at::Tensor balance_loss(const at::Tensor& scores, const at::Tensor& f, double total_tokens, int64_t topk) {
  const auto factor = static_cast<double>(scores.size(1)) / (static_cast<double>(topk) * total_tokens * total_tokens);
  return (scores.sum(0) * f.to(scores.scalar_type())).sum() * factor;
}

at::Tensor z_loss(const at::Tensor& logits, double total_tokens) {
  return logits.logsumexp(-1).square().sum() / total_tokens;
}

at::Tensor with_loss(const at::Tensor& x, const at::Tensor& loss, double scale) {
  return WithLoss::apply(x, loss, scale);
}

}  // namespace mcore_bridge
