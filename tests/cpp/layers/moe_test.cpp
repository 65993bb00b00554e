// Routing, permutation and grouped products against closed forms and plain loops in float64.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "layers/moe/grouped_linear.h"
#include "layers/moe/permutation.h"
#include "layers/moe/routing.h"

namespace mcore_bridge {
namespace {

at::Tensor random(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

std::vector<at::Tensor> gradients(const at::Tensor& y, std::vector<at::Tensor> of, const at::Tensor& grad) {
  return torch::autograd::grad(std::vector<at::Tensor>{y}, of, std::vector<at::Tensor>{grad}, /*retain_graph=*/true);
}

double largest_difference(const at::Tensor& a, const at::Tensor& b) { return (a - b).abs().max().item<double>(); }

TEST(Routing, GroupsLimitTheChoice) {
  // Group scores: 0.9 + 0.1, 0.6 + 0.5, 0.8 + 0.0: with a bias the sum of two counts, without one the best.
  const auto scores = at::tensor({0.9, 0.1, 0.6, 0.5, 0.8, 0.0}, at::kDouble).view({1, 6});
  const RoutingOptions options{.experts = 6, .topk = 2, .groups = 3, .group_topk = 1};
  EXPECT_TRUE(at::equal(best_experts(scores, at::zeros({6}, at::kDouble), options),
                        at::tensor({2, 3}, at::kLong).view({1, 2})));
  EXPECT_TRUE(at::equal(best_experts(scores, {}, options), at::tensor({0, 1}, at::kLong).view({1, 2})));
}

TEST(Routing, BiasTakesPartInTheChoiceOnly) {
  const auto scores = at::tensor({0.5, 0.3, 0.2}, at::kDouble).view({1, 3});
  const RoutingOptions options{.experts = 3, .topk = 1, .normalise = false, .scaling = 2};
  const auto experts = best_experts(scores, at::tensor({0.0, 0.0, 1.0}, at::kDouble), options);
  EXPECT_EQ(experts.item<int64_t>(), 2);
  EXPECT_DOUBLE_EQ(weighted_by_scores(scores, experts, options).weights.item<double>(), 0.4);
}

TEST(Routing, SmallestSum) {
  const auto scores = at::tensor({0.25, 0.25}, at::kDouble).view({1, 2});
  const RoutingOptions options{.experts = 2, .topk = 2, .smallest_sum = 1};
  const auto routing = weighted_by_scores(scores, at::tensor({0, 1}, at::kLong).view({1, 2}), options);
  EXPECT_DOUBLE_EQ(routing.weights.sum().item<double>(), 0.5);
}

TEST(Routing, EvenLoadHasBalanceLossOne) {
  const int64_t tokens = 12, experts = 4, topk = 2;
  const auto scores = at::full({tokens, experts}, 1.0 / experts, at::kDouble);
  const auto load = at::full({experts}, tokens * topk / experts, at::kLong);
  EXPECT_NEAR(balance_loss(scores, load, tokens, topk).item<double>(), 1, 1e-12);
  // All on one expert, which all scores want: E times as much for topk 1.
  const auto one = at::tensor({1.0, 0.0, 0.0, 0.0}, at::kDouble).expand({tokens, experts});
  const auto crowd = at::tensor({tokens, int64_t{0}, int64_t{0}, int64_t{0}}, at::kLong);
  EXPECT_NEAR(balance_loss(one, crowd, tokens, 1).item<double>(), experts, 1e-12);
}

TEST(Routing, ZLossOfEvenLogits) {
  EXPECT_NEAR(z_loss(at::zeros({5, 8}, at::kDouble), 5).item<double>(), std::log(8.0) * std::log(8.0), 1e-12);
}

TEST(Routing, SinkhornBalances) {
  at::manual_seed(3);
  auto logits = random({64, 4});
  logits.select(1, 0).add_(5);  // every token likes the first expert best
  const auto load = tokens_per_expert(sinkhorn_experts(logits, {.experts = 4, .topk = 1}), 4);
  EXPECT_LE(load.max().item<int64_t>(), 24) << load;
  EXPECT_EQ(tokens_per_expert(best_experts(logits, {}, {.experts = 4, .topk = 1}), 4)[0].item<int64_t>() > 56, true);
}

TEST(Routing, CapacityDropsTheSmallestOrTheLatest) {
  const auto experts = at::tensor({0, 1, 0, 0, 1, 2}, at::kLong).view({6, 1});
  const auto weights = at::tensor({0.1, 0.5, 0.3, 0.2, 0.9, 0.4}, at::kDouble).view({6, 1});
  const auto small = over_capacity(experts, weights, 3, 1, true), late = over_capacity(experts, weights, 3, 1, false);
  EXPECT_TRUE(at::equal(small.flatten(), at::tensor({1, 1, 0, 1, 0, 0}, at::kLong).to(at::kBool)));
  EXPECT_TRUE(at::equal(late.flatten(), at::tensor({0, 0, 1, 1, 1, 0}, at::kLong).to(at::kBool)));
}

TEST(Routing, WithLossSendsItsShare) {
  const auto x = random({3}).requires_grad_(true), loss = random({}).requires_grad_(true);
  with_loss(x, loss, 0.25).sum().backward();
  EXPECT_DOUBLE_EQ(loss.grad().item<double>(), 0.25);
  EXPECT_TRUE(at::equal(x.grad(), at::ones({3}, at::kDouble)));
}

TEST(Permutation, ThereAndBackIsTheWeightedSum) {
  at::manual_seed(1);
  const int64_t tokens = 7, topk = 3, experts = 5;
  const auto chosen = at::randn({tokens, experts}).argsort(1, /*descending=*/false).narrow(1, 0, topk).contiguous();
  const auto x = random({tokens, 4}).requires_grad_(true),
             weights = at::rand({tokens, topk}, at::kDouble).requires_grad_(true);
  const auto order = permutation(chosen);
  const auto rows = permute_tokens(x, order);
  const auto sorted = by_row(chosen, order);
  EXPECT_TRUE(at::equal(sorted, std::get<0>(sorted.sort())));
  const auto factor = by_row(chosen, order).to(at::kDouble).unsqueeze(1) + 1;  // expert e multiplies by e + 1
  const auto y = unpermute_tokens(rows * factor, weights, order);
  const auto expected = x * (weights * (chosen.to(at::kDouble) + 1)).sum(1, true);
  EXPECT_LT(largest_difference(y, expected), 1e-12);
  const auto g = random({tokens, 4});
  const auto actual = gradients(y, {x, weights}, g);
  const auto wanted = gradients(expected, {x, weights}, g);
  for (size_t i = 0; i < 2; ++i) EXPECT_LT(largest_difference(actual[i], wanted[i]), 1e-12);
}

TEST(Permutation, PaddedGivesEveryExpertItsCapacity) {
  const auto experts = at::tensor({0, 2, 2, 0, 3, 1}, at::kLong).view({3, 2});  // 3: dropped
  const auto order = padded_permutation(experts, 3, 2);
  const auto rows = permute_tokens(at::tensor({1.0, 2.0, 3.0}, at::kDouble).view({3, 1}), order).flatten();
  EXPECT_TRUE(at::equal(rows, at::tensor({1.0, 2.0, 3.0, 0.0, 1.0, 2.0}, at::kDouble))) << rows;
  const auto back = unpermute_tokens(rows.view({6, 1}), {}, order).flatten();
  EXPECT_TRUE(at::equal(back, at::tensor({2.0, 4.0, 3.0}, at::kDouble))) << back;
}

TEST(GroupedLinear, EqualsOneProductPerExpert) {
  at::manual_seed(2);
  const auto counts = at::tensor({3, 0, 4}, at::kLong);
  const auto x = random({9, 5}).requires_grad_(true), w = random({3, 6, 5}).requires_grad_(true),
             bias = random({3, 6}).requires_grad_(true);
  const auto y = grouped_linear(x, w, bias, expert_rows(counts, /*tail=*/true));
  const auto expected = at::cat({at::linear(x.narrow(0, 0, 3), w[0], bias[0]),
                                 at::linear(x.narrow(0, 3, 4), w[2], bias[2]), at::zeros({2, 6}, at::kDouble)});
  EXPECT_LT(largest_difference(y, expected), 1e-12);
  const auto g = random({9, 6});
  const auto actual = gradients(y, {x, w, bias}, g);
  const auto wanted = gradients(expected, {x, w, bias}, g);
  for (size_t i = 0; i < 3; ++i) EXPECT_LT(largest_difference(actual[i], wanted[i]), 1e-12) << i;
  EXPECT_TRUE(at::equal(actual[1][1], at::zeros({6, 5}, at::kDouble))) << "an expert without rows";
}

TEST(GroupedLinear, NoRowsAtAll) {
  const auto x = random({0, 5}).requires_grad_(true), w = random({2, 6, 5}).requires_grad_(true);
  const auto y = grouped_linear(x, w, {}, expert_rows(at::zeros({2}, at::kLong), false));
  EXPECT_EQ(y.size(0), 0);
  y.sum().backward();
  EXPECT_TRUE(at::equal(w.grad(), at::zeros_like(w)));
}

}  // namespace
}  // namespace mcore_bridge
