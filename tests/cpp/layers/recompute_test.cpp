#include "layers/recompute.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "layers/offload.h"

namespace mcore_bridge {
namespace {

struct Problem {
  at::Tensor x, y, w;
  Problem() {
    at::manual_seed(1);
    x = at::randn({5, 4}).requires_grad_(true);
    y = at::randn({5, 4}).requires_grad_(true);
    w = at::randn({4, 4}).requires_grad_(true);
  }
  std::vector<at::Tensor> grads() const { return {x.grad().clone(), y.grad().clone(), w.grad().clone()}; }
};

bool equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!at::equal(a[i], b[i])) return false;
  }
  return true;
}

}  // namespace

TEST(Recompute, SeveralTensorsWithDropout) {
  auto gradients = [](bool again, bool second) {
    const Problem p;
    auto block = [&](const std::vector<at::Tensor>& in) {
      const auto h = at::dropout(at::mm(in[0], p.w).tanh(), 0.5, true);
      return std::vector<at::Tensor>{h * in[1], h + in[1]};
    };
    at::manual_seed(7);
    const auto out = again ? recompute(block, {p.x, p.y}) : block({p.x, p.y});
    at::rand({3});  // the generator has moved on before backward
    (second ? out[0].sum() + out[1].sin().sum() : out[0].sum()).backward();
    return p.grads();
  };
  EXPECT_TRUE(equal(gradients(true, true), gradients(false, true)));
  EXPECT_TRUE(equal(gradients(true, false), gradients(false, false))) << "one output unused";
}

TEST(Recompute, BackwardLeavesTheGeneratorAlone) {
  const Problem p;
  at::manual_seed(7);
  const auto out = recompute([](const at::Tensor& in) { return at::dropout(in, 0.5, true); }, p.x);
  const auto expected = at::rand({4});
  at::manual_seed(7);
  const auto again = recompute([](const at::Tensor& in) { return at::dropout(in, 0.5, true); }, p.x);
  again.sum().backward();
  EXPECT_TRUE(at::equal(at::rand({4}), expected));
}

TEST(Recompute, BlocksKnowTheirSecondRun) {
  const Problem p;
  std::vector<bool> outer, inner;
  auto within = [&](const at::Tensor& in) {
    inner.push_back(recomputing());
    return in.sin();
  };
  const auto out = recompute(
      [&](const at::Tensor& in) {
        outer.push_back(recomputing());
        const auto y = at::GradMode::is_enabled() ? recompute(within, in) : within(in);
        outer.push_back(recomputing());
        return y * 2;
      },
      p.x);
  EXPECT_FALSE(recomputing());
  out.sum().backward();
  EXPECT_EQ(outer, (std::vector<bool>{false, false, true, true}));
  // In the outer block's second run the inner one runs for the first time, and its result is read.
  EXPECT_EQ(inner, (std::vector<bool>{false, false, true}));
  EXPECT_TRUE(at::allclose(p.x.grad(), p.x.detach().cos() * 2));
}

TEST(Offload, TensorsLeaveAndComeBack) {
  auto gradients = [](bool offload) {
    const Problem p;
    std::shared_ptr<OffloadedBlock> before;
    auto h = p.x * p.y;
    for (int i = 0; i < 3; ++i) {
      at::Tensor inner;
      {
        ActivationOffload::Block block;
        inner = at::mm(h, p.w);
        ActivationOffload::keep(h);
        ActivationOffload::keep(inner);
        ActivationOffload::keep(inner.view({-1}));  // the same storage
        const auto next = h + inner.sin();
        if (offload) before = block.leave(next, before);
        h = next;
      }
      if (offload) EXPECT_EQ(inner.storage().data(), nullptr);
    }
    h.sum().backward();
    return p.grads();
  };
  EXPECT_TRUE(equal(gradients(true), gradients(false)));
}

}  // namespace mcore_bridge
