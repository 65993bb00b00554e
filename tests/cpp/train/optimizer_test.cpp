#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <tuple>

#include "kernels/param_remainder.h"
#include "mcore_bridge/error.h"
#include "train/newton_schulz.h"
#include "train/sharded_optimizer.h"
#include "train/state_runs.h"

namespace mcore_bridge {
namespace {

/// Two parameters, one that decays and one that does not, and an optimizer over them.
struct Model {
  at::Tensor weight, norm;
  OptimizerOptions options;
  std::shared_ptr<ParameterBuffers> buffers;
  std::unique_ptr<ShardedOptimizer> optimizer;

  explicit Model(OptimizerOptions given, at::ScalarType dtype = at::kFloat, at::Tensor start = {}) : options(given) {
    options.lr_decay_style = "constant";
    options.validate();
    if (!start.defined()) start = at::tensor({1.0f, -2.0f, 3.0f});
    weight = start.to(dtype).clone().requires_grad_(true);
    norm = at::tensor({0.5f}).to(dtype).requires_grad_(true);
    std::vector<ManagedParameter> parameters{{.name = "w", .tensor = weight},
                                             {.name = "n", .tensor = norm, .traits = {.no_weight_decay = true}}};
    buffers = std::make_shared<ParameterBuffers>(parameters, ParallelState::single(), buffer_options(options));
    optimizer = std::make_unique<ShardedOptimizer>(buffers, ParallelState::single(), options, dtype == at::kHalf);
  }

  /// One step on d loss / d w = `gradient`, d loss / d n = 1.
  void step(const at::Tensor& gradient, double lr = 0.01, double scale = 1, double skip = 0) {
    buffers->begin(1);
    (weight * gradient.to(weight.scalar_type())).sum().backward();
    norm.sum().backward();
    buffers->finish_gradients();
    optimizer->step(lr, options.weight_decay, at::full({}, scale, at::kFloat), at::full({}, skip, at::kFloat));
    optimizer->finish_on_host(scale, skip > 0);
    buffers->gather_parameters();
  }
};

at::Tensor gradient_of(int step) { return at::tensor({1.0f, 2.0f, -3.0f}) * step; }

/// AdamW in double.
struct AdamReference {
  std::vector<double> value, m, v;
  explicit AdamReference(std::vector<double> start) : value(start), m(start.size()), v(start.size()) {}
  void step(int t, const std::vector<double>& grads, const std::vector<double>& decay, double lr) {
    for (size_t i = 0; i < value.size(); ++i) {
      m[i] = 0.9 * m[i] + 0.1 * grads[i];
      v[i] = 0.95 * v[i] + 0.05 * grads[i] * grads[i];
      value[i] -= lr * decay[i] * value[i];
      value[i] -= lr * (m[i] / (1 - std::pow(0.9, t))) / (std::sqrt(v[i] / (1 - std::pow(0.95, t))) + 1e-8);
    }
  }
};

void expect_adam(OptimizerOptions options, at::ScalarType dtype, double tolerance) {
  Model model(options, dtype);
  AdamReference reference({1, -2, 3, 0.5});
  for (int t = 1; t <= 3; ++t) {
    model.step(gradient_of(t), 0.01, 2.0);
    reference.step(t, {t / 2.0, 2 * t / 2.0, -3 * t / 2.0, 0.5}, {0.1, 0.1, 0.1, 0}, 0.01);
  }
  for (int i = 0; i < 3; ++i) EXPECT_NEAR(model.weight[i].item<float>(), reference.value[i], tolerance);
  EXPECT_NEAR(model.norm[0].item<float>(), reference.value[3], tolerance);
  EXPECT_EQ(model.optimizer->steps(), 3);
  for (const auto& slice : model.optimizer->state()) {
    if (slice.kind == "master" && slice.parameter == "w") {
      for (int i = 0; i < 3; ++i) EXPECT_NEAR(slice.values[i].item<float>(), reference.value[i], 2e-6);
    }
  }
  const auto before = model.weight.detach().clone();
  model.step(at::full({3}, NAN), 0.01, 1.0, 1.0);
  EXPECT_TRUE(at::equal(before, model.weight.detach()));
  EXPECT_EQ(model.optimizer->steps(), 3);
}

}  // namespace

TEST(Optimizer, AdamWClosedForm) { expect_adam({}, at::kFloat, 1e-6); }
TEST(Optimizer, AdamWMasters) { expect_adam({}, at::kBFloat16, 1e-2); }

TEST(Optimizer, AdamWInHostMemory) {
  OptimizerOptions options;
  options.optimizer_cpu_offload = true;
  for (const double fraction : {1.0, 0.5, 0.0}) {
    options.optimizer_offload_fraction = fraction;
    expect_adam(options, at::kFloat, 1e-6);
    expect_adam(options, at::kBFloat16, 1e-2);
  }
  options.optimizer_offload_fraction = 1.0;
  Model model(options, at::kBFloat16);
  EXPECT_EQ(model.optimizer->device_bytes(), 0);
  EXPECT_GT(model.optimizer->host_bytes(), 0);
}

TEST(Optimizer, AdamWLowPrecisionStates) {
  OptimizerOptions options;
  options.exp_avg_dtype = "bf16";
  options.exp_avg_sq_dtype = "bf16";
  expect_adam(options, at::kFloat, 2e-4);
  options.exp_avg_dtype = "fp16";
  expect_adam(options, at::kFloat, 2e-4);
  options.main_params_dtype = "bf16";
  Model model(options, at::kBFloat16);
  for (const auto& slice : model.optimizer->state()) EXPECT_NE(slice.kind, "master");
  model.step(gradient_of(1), 0.1);
  EXPECT_NEAR(model.weight[0].item<float>(), 1 - 0.01 - 0.1, 1e-2);
  options.exp_avg_sq_dtype = "fp16";
  EXPECT_THROW(options.validate(), ValueError);
}

TEST(Optimizer, RemaindersAreTheSameMasters) {
  for (const auto* name : {"adam", "sgd"}) {
    for (const auto* moments : {"fp32", "bf16"}) {
      OptimizerOptions options;
      options.optimizer = name;
      options.exp_avg_dtype = moments;
      Model whole(options, at::kBFloat16);
      options.store_param_remainders = true;
      Model split(options, at::kBFloat16);
      for (int t = 1; t <= 3; ++t) {
        for (auto* model : {&whole, &split}) model->step(gradient_of(t), 0.01, 2.0);
        std::map<std::string, at::Tensor> masters;
        for (const auto& slice : whole.optimizer->state())
          if (slice.kind == "master") masters[slice.parameter] = slice.values;
        int found = 0;
        for (const auto& slice : split.optimizer->state()) {
          EXPECT_NE(slice.kind, "master");
          if (slice.kind != "remainder") continue;
          const auto& parameter = slice.parameter == "w" ? split.weight : split.norm;
          const auto joined = join_master(parameter.detach().view({-1}), slice.values);
          EXPECT_TRUE(at::equal(joined, masters.at(slice.parameter))) << name << " " << slice.parameter;
          EXPECT_TRUE(at::equal(parameter.detach().view({-1}), masters.at(slice.parameter).to(at::kBFloat16)));
          ++found;
        }
        EXPECT_EQ(found, 2);
      }
      EXPECT_LT(split.optimizer->device_bytes(), whole.optimizer->device_bytes());
    }
  }
}

TEST(Optimizer, SgdClosedForm) {
  for (const double momentum : {0.0, 0.9}) {
    OptimizerOptions options;
    options.optimizer = "sgd";
    options.sgd_momentum = momentum;
    Model model(options);
    double value = 1, buffer = 0;
    for (int t = 1; t <= 3; ++t) {
      model.step(gradient_of(t), 0.01, 2.0);
      buffer = momentum * buffer + t / 2.0 + 0.1 * value;  // torch.optim.SGD: weight decay is part of the gradient
      value -= 0.01 * buffer;
    }
    EXPECT_NEAR(model.weight[0].item<float>(), value, 1e-6);
    EXPECT_EQ(model.optimizer->state().size(), momentum == 0 ? 0u : 2u);
  }
}

TEST(Optimizer, LearningRatesByName) {
  OptimizerOptions options;
  options.weight_decay = 0;
  options.lr_mult = {{"^n$", 0.0}, {"w", 0.5}};
  Model model(options);
  model.step(gradient_of(1), 0.1);
  EXPECT_NEAR(model.weight[0].item<float>(), 1 - 0.05, 1e-6);
  EXPECT_EQ(model.norm[0].item<float>(), 0.5f);
  options.lr_mult = {{"absent", 2.0}};
  EXPECT_THROW(Model{options}, ValueError);
}

TEST(Optimizer, StateRoundTrip) {
  Model one({}, at::kBFloat16), other({}, at::kBFloat16, at::zeros({3}));
  one.step(gradient_of(1));
  auto from = one.optimizer->state(), to = other.optimizer->state();
  ASSERT_EQ(from.size(), to.size());
  for (size_t i = 0; i < from.size(); ++i) {
    EXPECT_EQ(from[i].parameter + from[i].kind, to[i].parameter + to[i].kind);
    to[i].values.copy_(from[i].values);
  }
  other.optimizer->set_steps(one.optimizer->steps());
  other.optimizer->state_loaded();
  EXPECT_TRUE(at::equal(one.weight.detach(), other.weight.detach()));
  one.step(gradient_of(2));
  other.step(gradient_of(2));
  EXPECT_TRUE(at::equal(one.weight.detach(), other.weight.detach()));
}

TEST(Buffers, AccumulatesLowPrecisionInFp32) {
  for (const char* strategy : {"no_shard", "optim", "optim_grads", "optim_grads_params"}) {
    OptimizerOptions options;
    options.data_parallel_sharding_strategy = strategy;
    auto weight = at::ones({4}, at::kBFloat16).requires_grad_(true);
    ParameterBuffers buffers({{.name = "w", .tensor = weight}}, ParallelState::single(), buffer_options(options));
    for (auto& bucket : buffers.buckets()) bucket->start_gather();
    buffers.begin(4);
    // 256 + 1 is not a bfloat16: adding in bfloat16 would lose every one.
    (weight * 256).sum().backward();
    for (int i = 0; i < 3; ++i) weight.sum().backward();
    buffers.finish_gradients();
    EXPECT_EQ(buffers.buckets()[0]->grad_shard()[0].item<float>(), 259.0f) << strategy;
    EXPECT_FALSE(weight.grad().defined());
    EXPECT_NEAR(buffers.sum_of_squares().item<double>(), 4 * 259.0 * 259.0, 1.0);
    buffers.begin(1);
    weight.sum().backward();
    buffers.finish_gradients();
    EXPECT_EQ(buffers.buckets()[0]->grad_shard()[0].item<float>(), 1.0f) << "a step starts anew";
  }
}

TEST(Buffers, LateGradientsAreAnError) {
  OptimizerOptions options;
  options.overlap_grad_reduce = true;
  auto weight = at::ones({4}).requires_grad_(true);
  ParameterBuffers buffers({{.name = "w", .tensor = weight}}, ParallelState::single(), buffer_options(options));
  buffers.begin(1);
  weight.sum().backward();
  EXPECT_THROW(weight.sum().backward(), ValueError);
}

TEST(BucketLayout, CoversEverythingOnce) {
  std::vector<LayoutItem> items;
  for (int i = 0; i < 23; ++i)
    items.push_back({.elements = 1 + i * 37 % 401, .shards = 3, .key = i % 2, .order = i % 3, .whole = i % 2 == 1});
  const auto buckets = layout_buckets(items, 500);
  EXPECT_GT(buckets.size(), 4u);
  std::vector<int> seen(items.size());
  int previous = static_cast<int>(items.size());
  for (const auto& bucket : buckets) {
    ASSERT_EQ(bucket.elements % (3 * 64), 0);
    const auto shard = bucket.elements / 3;
    int64_t end = 0;
    int first = static_cast<int>(items.size());
    for (const auto& slot : bucket.slots) {
      ++seen[slot.item];
      first = std::min(first, slot.item);
      EXPECT_EQ(slot.offset % 64, 0);
      EXPECT_GE(slot.offset, end);
      end = slot.offset + items[slot.item].elements;
      EXPECT_EQ(items[slot.item].key, items[bucket.slots[0].item].key);
      if (items[slot.item].whole) {
        EXPECT_EQ(slot.offset / shard, (end - 1) / shard);
      }
    }
    EXPECT_LE(end, bucket.elements);
    EXPECT_LT(first, previous) << "not in the order backward completes them";
    previous = first;
  }
  for (const int count : seen) EXPECT_EQ(count, 1);
}

TEST(StateRuns, AreWhatIsUpdatedAlikeAndTheGapsBetween) {
  const std::vector<StateSlot> slots{{.offset = 0, .elements = 32, .kind = 1},
                                     {.offset = 64, .elements = 100, .kind = 1},
                                     {.offset = 192, .elements = 10, .kind = 2, .whole = true},
                                     {.offset = 256, .elements = 64, .kind = 3}};
  using Run = std::tuple<int64_t, int64_t, size_t, bool>;
  auto runs = [&](int64_t begin, int64_t end, int64_t& to_offload) {
    std::vector<Run> result;
    for (const auto& run : state_runs(slots, begin, end, to_offload))
      result.push_back({run.begin, run.end, run.first, run.on_host});
    return result;
  };
  int64_t none = 0, some = 50, more = 200;
  EXPECT_EQ(runs(0, 320, none), (std::vector<Run>{{0, 164, 0, false}, {192, 202, 2, false}, {256, 320, 3, false}}));
  EXPECT_EQ(runs(128, 256, none), (std::vector<Run>{{128, 164, 1, false}, {192, 202, 2, false}}));
  EXPECT_EQ(runs(0, 320, some),
            (std::vector<Run>{{0, 50, 0, true}, {50, 164, 0, false}, {192, 202, 2, false}, {256, 320, 3, false}}));
  EXPECT_EQ(some, 0);
  EXPECT_EQ(runs(0, 320, more),
            (std::vector<Run>{{0, 164, 0, true}, {192, 202, 2, false}, {256, 292, 3, true}, {292, 320, 3, false}}));
}

TEST(NewtonSchulz, Orthogonalizes) {
  at::manual_seed(1);
  for (const auto& sizes : {std::vector<int64_t>{12, 30}, {30, 12}, {16, 16}}) {
    const auto x = at::randn(sizes);
    const auto y = newton_schulz(x, {.steps = 12, .coefficients = "polar_express", .precision = "highest"});
    const auto [u, s, v] = at::linalg_svd(x, /*full_matrices=*/false);
    EXPECT_TRUE(at::allclose(y, at::mm(u, v), 1e-3, 2e-3)) << (y - at::mm(u, v)).abs().max();
  }
}

}  // namespace mcore_bridge
