// A gradient's way into its main gradient: numbers or memory.
#include "layers/main_gradient.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace mcore_bridge {
namespace {

TEST(MainGradient, TakesTheMemoryOfTheFirstContribution) {
  const MainGradient main{.grad = at::ones({4, 6})};
  const auto view = main.grad.view({24}).narrow(0, 6, 12);
  auto gradient = at::arange(24, at::kFloat).view({4, 6}).clone();
  const auto* memory = gradient.const_data_ptr();
  settle(main, std::move(gradient), /*accumulate=*/false);
  EXPECT_EQ(main.grad.const_data_ptr(), memory);
  EXPECT_TRUE(main.grad.equal(at::arange(24, at::kFloat).view({4, 6})));
  EXPECT_TRUE(view.equal(at::arange(6, 18, at::kFloat)));
  settle(main, at::ones({4, 6}), /*accumulate=*/true);
  EXPECT_EQ(main.grad.const_data_ptr(), memory);
  EXPECT_TRUE(view.equal(at::arange(7, 19, at::kFloat)));
}

TEST(MainGradient, StaysWhereItIsWhenItsMemoryIsNotItsOwn) {
  const auto flat = at::zeros({30});
  const auto expect_copied = [](const MainGradient& main, at::Tensor gradient) {
    const auto* memory = main.grad.const_data_ptr();
    const auto numbers = gradient.clone();
    settle(main, std::move(gradient), /*accumulate=*/false);
    EXPECT_EQ(main.grad.const_data_ptr(), memory);
    EXPECT_TRUE(main.grad.to(at::kFloat).equal(numbers));
  };
  expect_copied({.grad = flat.narrow(0, 0, 24)}, at::ones({24}));             // a part of a buffer
  expect_copied({.grad = at::zeros({24}), .fixed = true}, at::ones({24}));    // an address that is recorded
  expect_copied({.grad = at::zeros({24}, at::kDouble)}, at::ones({24}));      // another precision
  expect_copied({.grad = at::zeros({24})}, at::ones({25}).narrow(0, 1, 24));  // a part of a gradient
  expect_copied({.grad = at::zeros({4, 6})}, at::arange(24, at::kFloat).view({6, 4}).t());  // turned
  const auto shared = at::ones({24});
  expect_copied({.grad = at::zeros({24})}, shared);
  expect_copied({.grad = at::zeros({24})}, shared.view({24}));
}

}  // namespace
}  // namespace mcore_bridge
