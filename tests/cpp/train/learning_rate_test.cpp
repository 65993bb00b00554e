#include <gtest/gtest.h>

#include <cmath>

#include "mcore_bridge/error.h"
#include "mcore_bridge/trainer.h"

namespace mcore_bridge {
namespace {

OptimizerOptions options(const std::string& style) {
  OptimizerOptions result;
  result.lr = 1.0;
  result.min_lr = 0.1;
  result.train_iters = 100;
  result.lr_warmup_iters = 10;
  result.lr_decay_style = style;
  result.lr_wsd_decay_iters = 20;
  return result;
}

}  // namespace

TEST(LearningRate, WarmUp) {
  auto o = options("cosine");
  o.lr_warmup_init = 0.5;
  EXPECT_DOUBLE_EQ(learning_rate(o, 1), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(o, 6), 0.75);
  EXPECT_DOUBLE_EQ(learning_rate(o, 11), 1.0);
}

TEST(LearningRate, Styles) {
  EXPECT_DOUBLE_EQ(learning_rate(options("constant"), 90), 1.0);
  EXPECT_NEAR(learning_rate(options("linear"), 56), 0.1 + 0.9 * 0.5, 1e-12);
  EXPECT_NEAR(learning_rate(options("cosine"), 56), 0.55, 1e-12);
  EXPECT_NEAR(learning_rate(options("cosine"), 101), 0.1, 1e-12);
  EXPECT_DOUBLE_EQ(learning_rate(options("cosine"), 500), 0.1);
  EXPECT_NEAR(learning_rate(options("inverse-square-root"), 41), std::sqrt(10.0 / 40.0), 1e-12);
  auto wsd = options("WSD");
  EXPECT_DOUBLE_EQ(learning_rate(wsd, 81), 1.0);
  EXPECT_NEAR(learning_rate(wsd, 91), 0.1 + 0.9 * (2 * std::sqrt(0.5) - 1), 1e-12);
  wsd.lr_wsd_decay_style = "linear";
  EXPECT_NEAR(learning_rate(wsd, 91), 0.55, 1e-12);
  wsd.lr_wsd_decay_style = "minus_sqrt";
  EXPECT_NEAR(learning_rate(wsd, 91), 0.1 + 0.9 * (1 - std::sqrt(0.5)), 1e-12);
  wsd.lr_wsd_decay_style = "cosine";
  EXPECT_NEAR(learning_rate(wsd, 91), 0.55, 1e-12);
}

TEST(WeightDecay, Styles) {
  auto o = options("cosine");
  EXPECT_DOUBLE_EQ(weight_decay(o, 50), 0.1);
  o.start_weight_decay = 0.1;
  o.end_weight_decay = 0.5;
  o.weight_decay_incr_style = "linear";
  EXPECT_DOUBLE_EQ(weight_decay(o, 1), 0.1);
  EXPECT_NEAR(weight_decay(o, 26), 0.2, 1e-12);
  EXPECT_DOUBLE_EQ(weight_decay(o, 1000), 0.5);
  o.weight_decay_incr_style = "cosine";
  EXPECT_NEAR(weight_decay(o, 1), 0.1, 1e-12);
  EXPECT_NEAR(weight_decay(o, 51), 0.3, 1e-12);
  EXPECT_NEAR(weight_decay(o, 101), 0.5, 1e-12);
}

TEST(LearningRate, BadOptions) {
  auto bad = [](auto change) {
    auto o = options("cosine");
    change(o);
    EXPECT_THROW(o.validate(), ValueError);
  };
  EXPECT_NO_THROW(options("WSD").validate());
  bad([](auto& o) { o.lr_decay_style = "sideways"; });
  bad([](auto& o) { o.lr = -1; });
  bad([](auto& o) { o.lr = NAN; });
  bad([](auto& o) { o.min_lr = 2; });
  bad([](auto& o) { o.lr_warmup_iters = 100; });
  bad([](auto& o) { o.adam_beta1 = 1; });
  bad([](auto& o) { o.train_iters = 0; });
  bad([](auto& o) { o.lr_decay_style = "WSD", o.lr_wsd_decay_iters = 0; });
  bad([](auto& o) { o.optimizer = "lion"; });
  bad([](auto& o) { o.optimizer = "muon", o.data_parallel_sharding_strategy = "optim_grads_params"; });
  bad([](auto& o) { o.optimizer = "muon", o.optimizer_cpu_offload = true; });
  bad([](auto& o) { o.data_parallel_sharding_strategy = "everything"; });
  bad([](auto& o) { o.overlap_grad_reduce = true, o.data_parallel_sharding_strategy = "optim_grads"; });
  bad([](auto& o) { o.weight_decay_incr_style = "linear"; });
  bad([](auto& o) { o.lr_mult = {{"(", 1.0}}; });
  bad([](auto& o) { o.initial_loss_scale = 0.5; });
}

}  // namespace mcore_bridge
