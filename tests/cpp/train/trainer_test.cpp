#include "mcore_bridge/trainer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "layers/cross_entropy.h"
#include "mcore_bridge/error.h"
#include "models/gpt_model.h"
#include "train/optimizer_state.h"

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

/// float16 skips steps that overflow, halves its scale, and learns.
TEST(Trainer, SkipsOverflowsInFloat16) {
  Chunks chunks{build_model(tiny("float16"))};
  initialize(chunks, 1);
  OptimizerOptions options;
  options.lr = 1e-2;
  options.lr_decay_style = "constant";
  options.initial_loss_scale = 1 << 30;
  options.hysteresis = 1;
  options.loss_scale_window = 8;
  Trainer trainer(chunks, options);
  ForwardInput batch;
  batch.input_ids = at::arange(12).remainder(19).view({2, 6});
  batch.labels = (batch.input_ids + 1).remainder(19);
  std::vector<at::Tensor> before;
  for (auto& p : chunks[0]->named_parameters()) before.push_back(p.tensor.detach().clone());
  auto result = trainer.train_step({batch});
  EXPECT_TRUE(result.skipped);
  EXPECT_EQ(result.loss_scale, 1 << 30);
  size_t i = 0;
  for (auto& p : chunks[0]->named_parameters()) EXPECT_TRUE(at::equal(before[i++], p.tensor)) << p.name;
  EXPECT_EQ(trainer.optimizer().steps(), 0);
  const double first = result.loss;
  int64_t skipped = 0;
  bool grew = false;
  double scale = result.loss_scale;
  for (int step = 0; step < 60; ++step) {
    result = trainer.train_step({batch});
    grew = grew || result.loss_scale > scale;
    scale = result.loss_scale;
    skipped += result.skipped;
  }
  EXPECT_GT(skipped, 3);
  EXPECT_TRUE(grew);
  EXPECT_EQ(result.skipped_steps, skipped + 1);
  EXPECT_EQ(trainer.optimizer().steps(), 60 - skipped);
  EXPECT_LT(result.loss, first / 2);
  EXPECT_EQ(trainer.optimizer().scalars().at("skipped"), skipped + 1);

  chunks[0]->named_parameters()[0].tensor.detach().fill_(NAN);  // no scale helps
  EXPECT_THROW(
      {
        for (int step = 0; step < 60; ++step) trainer.train_step({batch});
      },
      NonFiniteError);
}

/// Weights loaded after the trainer was made count, also where masters are kept.
TEST(Trainer, TakesOverWrittenParameters) {
  Chunks chunks{build_model(tiny("bfloat16"))};
  initialize(chunks, 1);
  OptimizerOptions options;
  options.lr_decay_style = "constant";
  options.lr = 1e-6;
  Trainer trainer(chunks, options);
  ForwardInput batch;
  batch.input_ids = at::arange(12).remainder(19).view({2, 6});
  batch.labels = (batch.input_ids + 1).remainder(19);
  trainer.train_step({batch});
  initialize(chunks, 2);
  const auto written = chunks[0]->named_parameters()[0].tensor.detach().clone();
  trainer.train_step({batch});
  EXPECT_TRUE(at::allclose(chunks[0]->named_parameters()[0].tensor.detach().to(at::kFloat), written.to(at::kFloat),
                           1e-2, 1e-4));
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
