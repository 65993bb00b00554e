#include "mcore_bridge/planner.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <chrono>

#include "mcore_bridge/error.h"
#include "mcore_bridge/schedule.h"
#include "mcore_bridge/trainer.h"
#include "models/gpt_model.h"
#include "planner/memory.h"
#include "planner/time.h"
#include "train/sharded_optimizer.h"

namespace mcore_bridge {
namespace {

ModelConfig llama_405b() {
  auto fields = ModelConfig::from_hf({{"model_type", "llama"},
                                      {"hidden_size", 16384},
                                      {"intermediate_size", 53248},
                                      {"num_hidden_layers", 126},
                                      {"num_attention_heads", 128},
                                      {"num_key_value_heads", 8},
                                      {"vocab_size", 128256},
                                      {"max_position_embeddings", 131072},
                                      {"tie_word_embeddings", false}});
  fields["params_dtype"] = "bfloat16";
  auto config = ModelConfig::from_json(fields);
  config.finalize();
  return config;
}

PlanRequest big(int64_t gpus) {
  return {.config = llama_405b(),
          .run = {.processes = gpus, .micro_batch_size = 1, .global_batch_size = gpus, .sequence_length = 8192},
          .hardware = Hardware::named("h100")};
}

}  // namespace

/// Every parameter of the model is on exactly one stage and tensor rank (or all of them), whatever the layout.
TEST(Planner, StagesHoldTheWholeModel) {
  auto request = big(64);
  request.config.tensor_model_parallel_size = 8;
  request.config.pipeline_model_parallel_size = 7;
  request.run.processes = 56;
  request.run.global_batch_size = 56;
  request.config.finalize();
  const auto plan = plan_layout(request);
  ASSERT_EQ(plan.stages.size(), 7u);
  int64_t layers = 0;
  double total = 0;
  for (const auto& stage : plan.stages) {
    layers += stage.layers.count;
    total += static_cast<double>(stage.parameters) * 8;
    EXPECT_EQ(stage.in_flight, std::min<int64_t>(plan.micro_batches, 7 - stage.stage));
    EXPECT_NEAR(stage.memory.weights, 2.0 * stage.parameters, 1e-4 * stage.memory.weights);  // buckets are padded
    EXPECT_NEAR(stage.memory.gradients, 4.0 * stage.trainable, 1e-4 * stage.memory.gradients);
  }
  EXPECT_EQ(layers, 126);
  EXPECT_NEAR(total / 405.85e9, 1.0, 1e-3);                                // norms count on all eight ranks
  EXPECT_NEAR(plan.model_flops / (6 * 405.85e9 * 8192 * 56), 1.04, 0.04);  // 6 N D and attention
}

TEST(Planner, SearchesThousandsOfGpusInSeconds) {
  for (const int64_t gpus : {1024}) {
    const auto start = std::chrono::steady_clock::now();
    const auto plans = search_layouts(big(gpus), {}, 5);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    EXPECT_LT(took.count(), 60) << gpus;
    ASSERT_EQ(plans.size(), 5u);
    for (size_t i = 0; i < plans.size(); ++i) {
      EXPECT_TRUE(plans[i].fits) << gpus;
      EXPECT_LE(static_cast<double>(plans[i].worst_stage().memory.total()), Hardware::named("h100").memory);
      if (i > 0) EXPECT_LE(plans[i].tokens_per_second, plans[i - 1].tokens_per_second);
      EXPECT_GT(plans[i].mfu, 0.05);
      EXPECT_LT(plans[i].mfu, 0.75);
    }
  }
}

TEST(Planner, FixedSizesStay) {
  auto request = big(1024);
  request.config.tensor_model_parallel_size = 8;
  request.config.recompute_granularity = "full";
  for (const auto& plan : search_layouts(request, {.tensor = true, .micro_batch = true, .recompute = true}, 1000)) {
    EXPECT_EQ(plan.layout.tensor, 8);
    EXPECT_EQ(plan.layout.run.micro_batch_size, 1);
    EXPECT_EQ(plan.recompute, "full");
  }
}

TEST(Planner, RefusesWhatCannotBe) {
  auto request = big(1000);  // 8 x 126 does not fit
  request.config.tensor_model_parallel_size = 64;
  try {
    plan_layout(request);
    FAIL();
  } catch (const ValueError& error) {
    EXPECT_NE(std::string(error.what()).find("the nearest layout that works"), std::string::npos) << error.what();
  }
  EXPECT_THROW(Hardware::named("abacus"), ValueError);
}

TEST(Planner, NearestFittingFits) {
  auto request = big(512);
  request.config.tensor_model_parallel_size = 8;
  request.config.finalize();
  EXPECT_FALSE(plan_layout(request).fits);
  const auto plan = nearest_fitting(request);
  ASSERT_TRUE(plan);
  EXPECT_TRUE(plan->fits);
  request.memory = 1e9;
  EXPECT_FALSE(nearest_fitting(request));
}

/// The schedule's idle time does not depend on how many micro-batches are played beyond twice the stages.
TEST(Planner, BubbleIsTheSchedules) {
  for (const int stages : {2, 4, 8}) {
    for (const int batches : {1, 3, 8, 11, 40}) {
      for (const int chunks : {1, 2, 3}) {
        for (const char* name : {"1f1b", "zb-h1"}) {
          if (name == std::string("zb-h1") && chunks > 1) continue;
          ModelConfig config;
          config.pipeline_model_parallel_size = stages;
          if (chunks > 1) config.virtual_pipeline_model_parallel_size = chunks;
          config.pipeline_schedule = name;
          const auto plan = plan_schedule(config, batches, 2.0);
          const auto played =
              simulate(make_schedule({.name = name, .stages = stages, .chunks = chunks, .micro_batches = batches}),
                       {.chunks = {{.forward = 1, .backward_input = 1, .backward_weight = 1}}});
          EXPECT_NEAR(plan->idle / (plan->idle + batches), played.bubble_fraction, 1e-9)
              << name << " " << stages << " " << chunks << " " << batches;
          EXPECT_EQ(plan->in_flight, played.peak_activations) << name << " " << stages << " " << chunks;
        }
      }
    }
  }
}

/// What the planner counts is what a trainer of the same model allocates.
TEST(Planner, TrainableBytesAreTheTrainers) {
  auto fields = ModelConfig::from_hf({{"model_type", "llama"},
                                      {"hidden_size", 16},
                                      {"intermediate_size", 32},
                                      {"num_hidden_layers", 2},
                                      {"num_attention_heads", 4},
                                      {"vocab_size", 19}});
  fields["params_dtype"] = "bfloat16";
  PlanRequest request{.config = ModelConfig::from_json(fields),
                      .run = {.processes = 1, .micro_batch_size = 1, .global_batch_size = 2, .sequence_length = 8},
                      .lora = LoraOptions{.r = 3, .target_modules = {"q_proj", "down_proj"}},
                      .hardware = Hardware::named("a100")};
  request.config.finalize();
  const auto plan = plan_layout(request);
  Chunks chunks{build_model(request.config)};
  add_lora(chunks, *request.lora);
  int64_t parameters = 0, trainable = 0;
  for (const auto& parameter : chunks[0]->named_parameters()) {
    parameters += parameter.tensor.numel();
    if (parameter.tensor.requires_grad()) trainable += parameter.tensor.numel();
  }
  EXPECT_EQ(plan.stages[0].parameters, parameters);
  EXPECT_EQ(plan.stages[0].trainable, trainable);
  for (const double offloaded : {0.0, 0.3, 1.0}) {
    request.optimizer.optimizer_cpu_offload = offloaded > 0;
    request.optimizer.optimizer_offload_fraction = offloaded;
    const auto buffers = std::make_shared<ParameterBuffers>(managed_parameters(chunks), ParallelState::single(),
                                                            buffer_options(request.optimizer));
    const ShardedOptimizer optimizer(buffers, ParallelState::single(), request.optimizer, /*fp16=*/false);
    EXPECT_EQ(plan_layout(request).stages[0].memory.optimizer, optimizer.device_bytes()) << offloaded;
    // Rows of 16 and of 3 begin at multiples of 64 elements: the gaps have states as well.
    EXPECT_GT(optimizer.device_bytes() + optimizer.host_bytes(), 12 * trainable);
  }
}

}  // namespace mcore_bridge
