#include "layers/attention/tile_attention.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace mcore_bridge {
namespace {

struct Inputs {
  at::Tensor q, k, v, grad;
};

Inputs inputs(int64_t s, int64_t t, int64_t b, int64_t heads, int64_t groups, int64_t d, at::ScalarType type) {
  at::manual_seed(1);
  auto random = [&](int64_t rows, int64_t n) { return at::randn({rows, b, n, d}, at::kDouble).to(type); };
  return {random(s, heads), random(t, groups), random(t, groups), random(s, heads)};
}

/// Relative to what is expected, or to `scale` where that is larger: a window of one key has no gradient of scores.
double error(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& scale = {}) {
  auto size = expected.to(at::kDouble).norm();
  if (scale.defined()) size = at::max(size, scale.to(at::kDouble).norm());
  return ((actual - expected).to(at::kDouble).norm() / size).item<double>();
}

/// The same by the definition, in fp64, with autograd.
struct Reference {
  at::Tensor out, log_sum, dq, dk, dv;
  Reference(const Inputs& x, const at::Tensor& hidden) {
    auto leaf = [](const at::Tensor& t) { return t.to(at::kDouble).detach().requires_grad_(true); };
    const auto q = leaf(x.q), k = leaf(x.k), v = leaf(x.v);
    const auto repeat = x.q.size(2) / x.k.size(2);
    const auto kk = k.repeat_interleave(repeat, 2), vv = v.repeat_interleave(repeat, 2);
    auto scores = at::einsum("sbnd,tbnd->bnst", {q, kk}) / std::sqrt(static_cast<double>(q.size(3)));
    scores = scores.masked_fill(hidden, -std::numeric_limits<double>::infinity());
    out = at::einsum("bnst,tbnd->sbnd", {scores.softmax(-1), vv});
    log_sum = scores.logsumexp(-1).permute({2, 0, 1});
    out.backward(x.grad.to(at::kDouble));
    dq = q.grad();
    dk = k.grad();
    dv = v.grad();
  }
};

void check(const Inputs& x, const std::vector<Tile>& tiles, double tolerance) {
  auto hidden = at::ones({x.q.size(0), x.k.size(0)}, at::kBool);
  for (const auto& tile : tiles) {
    for (int64_t i = 0; i < tile.q_count; ++i) {
      for (int64_t j = 0; j < tile.k_count; ++j) {
        const auto apart = tile.distance + i - j;
        if ((tile.causal && apart < 0) || (tile.windowed && apart > tile.window)) continue;
        hidden[tile.q_first + i][tile.k_first + j] = false;
      }
    }
  }
  const Reference expected(x, hidden);
  const at::NoGradGuard no_grad;
  const TileSet set(tiles, at::kCPU);
  auto sum = PartialAttention::none(x.q);
  attend(sum, x.q, x.k, x.v, set);
  EXPECT_LT(error(sum.out, expected.out), tolerance);
  EXPECT_LT(error(sum.log_sum, expected.log_sum), tolerance);
  const auto type = sum.out.scalar_type();
  auto dq = at::zeros(x.q.sizes(), type), dk = at::zeros(x.k.sizes(), type), dv = at::zeros(x.v.sizes(), type);
  attend_backward({x.q, sum.out.to(x.q.scalar_type()), sum.log_sum, x.grad}, x.k, x.v, set, dq, dk, dv);
  EXPECT_LT(error(dq, expected.dq, x.grad), tolerance);
  EXPECT_LT(error(dk, expected.dk, x.grad), tolerance);
  EXPECT_LT(error(dv, expected.dv), tolerance);
}

}  // namespace

TEST(TileAttention, RingOfTilesIsTheWholeAttention) {
  const std::vector<int64_t> ends = {0, 16, 40};
  for (const int64_t window : {-1, 0, 2, 5, 9, 17}) {
    for (const auto& [heads, groups] : std::vector<std::pair<int64_t, int64_t>>{{4, 4}, {6, 2}}) {
      // One rank: every pair of the two chunks' tiles, documents and windows.
      const auto x = inputs(40, 40, 1, heads, groups, 12, at::kFloat);
      check(x, ring_tiles(ends, 1, 0, 0, window), 2e-6);
      check(x, gathered_tiles(ends, 1, 0, window), 2e-6);
      const auto y = inputs(10, 40, 1, heads, groups, 8, at::kDouble);
      check(y, gathered_tiles(ends, 4, 2, window), 1e-12);
    }
  }
}

TEST(TileAttention, BatchesAndLowPrecision) {
  for (const int64_t window : {-1, 6}) {
    check(inputs(24, 24, 3, 4, 2, 16, at::kFloat), gathered_tiles({0, 24}, 1, 0, window), 2e-6);
    check(inputs(24, 24, 2, 4, 2, 16, at::kBFloat16), gathered_tiles({0, 24}, 1, 0, window), 1e-2);
  }
}

/// A long window is worked on in blocks of rows, each with few keys.
TEST(TileAttention, LongWindowsInBlocks) {
  check(inputs(300, 300, 1, 2, 1, 8, at::kFloat), gathered_tiles({0, 300}, 1, 0, 3), 2e-6);
  check(inputs(300, 300, 1, 2, 1, 8, at::kFloat), gathered_tiles({0, 300}, 1, 0, 90), 2e-6);
}

}  // namespace mcore_bridge
