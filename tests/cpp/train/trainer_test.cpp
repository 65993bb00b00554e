#include "mcore_bridge/trainer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "layers/cross_entropy.h"
#include "models/gpt_model.h"
#include "train/adamw.h"
#include "train/grad_buffer.h"

namespace mcore_bridge {
namespace {

ModelConfig tiny(const char* dtype) {
  auto fields = ModelConfig::from_hf({{"model_type", "llama"},
                                      {"hidden_size", 16},
                                      {"intermediate_size", 32},
                                      {"num_hidden_layers", 2},
                                      {"num_attention_heads", 4},
                                      {"num_key_value_heads", 2},
                                      {"vocab_size", 19},
                                      {"tie_word_embeddings", true}});
  fields["params_dtype"] = dtype;
  auto config = ModelConfig::from_json(fields);
  config.finalize();
  return config;
}

}  // namespace

/// The library alone, without Python or process groups: build, initialise, train.
TEST(Trainer, LearnsOneBatch) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    Chunks chunks{build_model(tiny(dtype))};
    initialize(chunks, 1);
    OptimizerOptions options;
    options.lr = 1e-2;
    options.lr_decay_style = "constant";
    Trainer trainer(chunks, options);
    ForwardInput batch;
    batch.input_ids = at::arange(12).remainder(19).view({2, 6});
    batch.labels = (batch.input_ids + 1).remainder(19);
    const double first = trainer.train_step({batch}).loss;
    StepResult last;
    for (int i = 0; i < 30; ++i) last = trainer.train_step({batch});
    EXPECT_LT(last.loss, first / 2) << dtype;
    EXPECT_EQ(last.iteration, 31);
    EXPECT_EQ(last.loss_tokens, 12);
    EXPECT_NEAR(trainer.evaluate({batch}), last.loss, 0.3);
  }
}

/// Two steps of AdamW against the formulae, in double.
TEST(AdamW, ClosedForm) {
  auto weight = at::tensor({1.0f, -2.0f, 3.0f}).requires_grad_(true);
  auto norm = at::tensor({0.5f}).requires_grad_(true);
  GradBuffer gradients({{"w", weight, {}}, {"n", norm, {.no_weight_decay = true}}}, ParallelState::single());
  OptimizerOptions options;
  options.weight_decay = 0.1;
  AdamW optimizer(gradients, options);
  const double lr = 0.01;
  std::vector<double> value{1, -2, 3, 0.5}, m(4), v(4);
  const auto one = at::ones({}), two = at::full({}, 2.0f), zero = at::zeros({});
  for (int step = 1; step <= 2; ++step) {
    gradients.begin();
    (weight * at::tensor({1.0f, 2.0f, 3.0f}) * step).sum().backward();
    norm.sum().backward();
    optimizer.step(lr, two, zero);
    const double grads[] = {1.0 * step / 2, 2.0 * step / 2, 3.0 * step / 2, 0.5};
    for (int i = 0; i < 4; ++i) {
      m[i] = 0.9 * m[i] + 0.1 * grads[i];
      v[i] = 0.95 * v[i] + 0.05 * grads[i] * grads[i];
      const double decay = i < 3 ? 0.1 : 0;
      value[i] -= lr * decay * value[i];
      value[i] -= lr * (m[i] / (1 - std::pow(0.9, step))) / (std::sqrt(v[i] / (1 - std::pow(0.95, step))) + 1e-8);
    }
    for (int i = 0; i < 3; ++i) EXPECT_NEAR(weight[i].item<float>(), value[i], 1e-6);
    EXPECT_NEAR(norm[0].item<float>(), value[3], 1e-6);
  }
  const auto before = weight.detach().clone();
  optimizer.step(lr, one, one);  // skipped
  EXPECT_TRUE(at::equal(before, weight.detach()));
}

TEST(GradBuffer, AccumulatesLowPrecisionInFp32) {
  auto weight = at::ones({4}, at::kBFloat16).requires_grad_(true);
  GradBuffer gradients({{"w", weight, {}}}, ParallelState::single());
  gradients.begin();
  // 256 + 1 is not a bfloat16: adding in bfloat16 would lose every one.
  (weight * 256).sum().backward();
  for (int i = 0; i < 3; ++i) weight.sum().backward();
  EXPECT_EQ(gradients.parameters()[0].main_grad[0].item<float>(), 259.0f);
  EXPECT_FALSE(weight.grad().defined());
  EXPECT_NEAR(gradients.sum_of_squares().item<double>(), 4 * 259.0 * 259.0, 1.0);
  gradients.begin();
  EXPECT_EQ(gradients.parameters()[0].main_grad[0].item<float>(), 0.0f);
}

TEST(CrossEntropy, MatchesLibtorchAndIgnoresPaddingColumns) {
  auto logits = at::randn({5, 2, 16}).requires_grad_(true);
  auto labels = at::randint(0, 13, {5, 2}, at::kLong);
  labels[2][1] = -100;
  const auto loss = vocab_parallel_cross_entropy(logits, labels, 13, Group());
  auto reference_logits = logits.detach().clone().requires_grad_(true);
  const auto reference = at::cross_entropy_loss(reference_logits.narrow(-1, 0, 13).reshape({10, 13}),
                                                labels.reshape({10}), {}, at::Reduction::None, -100);
  EXPECT_TRUE(at::allclose(loss.reshape({10}), reference, 1e-5, 1e-6));
  loss.sum().backward();
  reference.sum().backward();
  EXPECT_TRUE(at::allclose(logits.grad(), reference_logits.grad(), 1e-5, 1e-6));
}

}  // namespace mcore_bridge
