#include "mcore_bridge/trainer.h"

#include <ATen/ATen.h>

#include <cmath>

#include "mcore_bridge/error.h"
#include "parallel/together.h"
#include "train/adamw.h"
#include "train/executor.h"
#include "train/grad_buffer.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kIgnore = -100;

std::vector<NamedParameter> all_parameters(const Chunks& chunks) {
  std::vector<NamedParameter> result;
  for (const auto& chunk : chunks) {
    for (auto& parameter : chunk->named_parameters()) result.push_back(std::move(parameter));
  }
  return result;
}

/// Counts that all data-parallel ranks must know before the step starts.
struct BatchCounts {
  int64_t micro_batches = 0;             ///< of this rank
  int64_t all_micro_batches = 0;         ///< of all data-parallel ranks
  int64_t tokens = 0, loss_tokens = 0;   ///< over all data-parallel ranks
  std::vector<int64_t> own_loss_tokens;  ///< by micro-batch
};

void check_batch(const ForwardInput& batch, size_t index, const GPTModel& model) {
  auto bad = [&](const auto&... what) { fail("train_step: micro-batch ", index, ": ", what...); };
  if (!batch.input_ids.defined() || batch.input_ids.dim() != 2) bad("input_ids [b, s] is missing");
  if (!batch.labels.defined()) bad("labels is missing; labels[t] is the target of position t, -100 for none");
  if (batch.labels.sizes() != batch.input_ids.sizes())
    bad("labels ", batch.labels.sizes(), " and input_ids ", batch.input_ids.sizes(), " differ in shape");
  if (batch.input_ids.numel() == 0) bad("it holds no token");
  const auto tp = model.parallel().tp.size();
  if (model.config().sequence_parallel && batch.input_ids.size(1) % tp != 0) {
    bad("with sequence_parallel its ", batch.input_ids.size(1), " positions must divide by tensor_model_parallel_size ",
        tp, "; pad it");
  }
  if (batch.packed && batch.input_ids.size(0) != 1)
    bad("a packed micro-batch is one row, input_ids has ", batch.input_ids.size(0));
  const auto vocabulary = model.config().padded_vocab_size;
  if (batch.input_ids.is_cpu()) {
    const auto low = batch.input_ids.min().item<int64_t>(), high = batch.input_ids.max().item<int64_t>();
    if (low < 0 || high >= vocabulary)
      bad("input_ids holds ", low < 0 ? low : high, ", the vocabulary has ", vocabulary, " tokens");
  }
  if (batch.labels.is_cpu() && batch.labels.max().item<int64_t>() >= vocabulary)
    bad("labels holds ", batch.labels.max().item<int64_t>(), ", the vocabulary has ", vocabulary, " tokens");
}

BatchCounts count(const std::vector<ForwardInput>& batches, const GPTModel& model) {
  const auto& parallel = model.parallel();
  BatchCounts counts;
  together(parallel.world, [&] {
    MCB_CHECK(!batches.empty(), "train_step: no micro-batches given");
    for (size_t i = 0; i < batches.size(); ++i) {
      check_batch(batches[i], i, model);
      counts.tokens += batches[i].input_ids.numel();
      counts.own_loss_tokens.push_back(batches[i].labels.ne(kIgnore).sum().item<int64_t>());
      counts.loss_tokens += counts.own_loss_tokens.back();
    }
    counts.micro_batches = static_cast<int64_t>(batches.size());
  });
  counts.all_micro_batches = counts.micro_batches;
  if (parallel.dp_cp.size() > 1) {
    auto sums = at::tensor({counts.tokens, counts.loss_tokens, counts.micro_batches}, at::kLong);
    parallel.dp_cp.all_reduce(sums);
    counts.tokens = sums[0].item<int64_t>();
    counts.loss_tokens = sums[1].item<int64_t>();
    counts.all_micro_batches = sums[2].item<int64_t>();
    together(parallel.world, [&] {
      MCB_CHECK(counts.micro_batches * parallel.dp_cp.size() == counts.all_micro_batches,
                "train_step: this data-parallel rank has ", counts.micro_batches, " micro-batches, all ",
                parallel.dp_cp.size(), " together ", counts.all_micro_batches, "; every rank needs equally many");
    });
  }
  MCB_CHECK(counts.loss_tokens > 0, "train_step: no token of the global batch carries loss (all labels are -100)");
  return counts;
}

/// What each token's loss of a micro-batch counts, so that the weighted sum over all of them is the mean asked for.
std::vector<double> loss_weights(const BatchCounts& counts, bool per_token) {
  std::vector<double> weights;
  for (const auto own : counts.own_loss_tokens) {
    weights.push_back(per_token ? 1.0 / static_cast<double>(counts.loss_tokens)
                                : 1.0 / static_cast<double>(std::max<int64_t>(1, own)) /
                                      static_cast<double>(counts.all_micro_batches));
  }
  return weights;
}

ForwardInput moved(ForwardInput batch, c10::Device device) {
  for (auto* tensor : {&batch.input_ids, &batch.position_ids, &batch.attention_mask, &batch.labels}) {
    if (tensor->defined()) *tensor = tensor->to(device, /*non_blocking=*/true);
  }
  if (batch.packed) batch.packed->cu_seqlens = batch.packed->cu_seqlens.to(device, /*non_blocking=*/true);
  return batch;
}

std::vector<ForwardInput> moved(const std::vector<ForwardInput>& batches, c10::Device device) {
  std::vector<ForwardInput> result;
  for (const auto& batch : batches) result.push_back(moved(batch, device));
  return result;
}

}  // namespace

struct Trainer::State {
  Chunks chunks;
  OptimizerOptions options;
  GradBuffer gradients;
  AdamW optimizer;
  Executor executor;
  int64_t iteration = 0;

  State(Chunks given, OptimizerOptions opts)
      : chunks(std::move(given)),
        options(std::move(opts)),
        gradients(all_parameters(chunks), chunks.at(0)->parallel_ptr()),
        optimizer(gradients, options),
        executor(chunks) {}

  const GPTModel& model() const { return *chunks[0]; }

  /// One rank per model replica's last stage reports the loss; every replica's sum of squares is the same.
  at::Tensor totals(const at::Tensor& loss, const at::Tensor& squares) const {
    const auto& parallel = model().parallel();
    auto result = at::zeros({2}, at::TensorOptions(model().device()).dtype(at::kDouble));
    if (parallel.is_last_stage() && parallel.tp.rank() == 0) result[0] += loss;
    if (parallel.dp_cp.rank() == 0 && squares.defined()) result[1] += squares.to(model().device());
    parallel.world.all_reduce(result);
    return result;
  }
};

void finish_gradients(const Chunks& chunks) {
  at::NoGradGuard no_grad;
  const auto& parallel = chunks.at(0)->parallel();
  std::vector<TrainableParameter> parameters;
  for (auto& parameter : all_parameters(chunks)) {
    if (!parameter.tensor.requires_grad()) continue;
    auto& grad = parameter.tensor.mutable_grad();
    if (!grad.defined()) grad = at::zeros_like(parameter.tensor);
    parameters.push_back({parameter.name, parameter.tensor, grad, parameter.traits});
  }
  complete_gradients(parameters, parallel);
  for (auto& parameter : parameters) parallel.dp_cp.all_reduce(parameter.main_grad);
}

Trainer::Trainer(Chunks chunks, OptimizerOptions options) {
  options.validate();
  MCB_CHECK(chunks.empty() || chunks[0]->config().params_dtype != at::kHalf,
            "Trainer: float16 needs loss scaling, which this version does not have; use bfloat16");
  MCB_CHECK(chunks.size() == 1, "Trainer: needs exactly one model chunk in this version, found ", chunks.size());
  state_ = std::make_unique<State>(std::move(chunks), std::move(options));
}

Trainer::~Trainer() = default;

int64_t Trainer::iteration() const { return state_->iteration; }

Optimizer& Trainer::optimizer() { return state_->optimizer; }

StepResult Trainer::train_step(const std::vector<ForwardInput>& micro_batches) {
  auto& s = *state_;
  const auto counts = count(micro_batches, s.model());
  const auto batches = moved(micro_batches, s.model().device());
  const auto weights = loss_weights(counts, s.options.calculate_per_token_loss);
  StepResult result{.iteration = s.iteration + 1,
                    .lr = learning_rate(s.options, s.iteration + 1),
                    .tokens = counts.tokens,
                    .loss_tokens = counts.loss_tokens};

  for (auto& chunk : s.chunks) chunk->train(true);
  s.gradients.begin();
  const auto schedule = one_forward_one_backward(s.model().parallel().pp.size(), static_cast<int>(batches.size()));
  const auto loss = s.executor.train(schedule, batches, weights);
  s.gradients.reduce();

  at::NoGradGuard no_grad;
  const auto totals = s.totals(loss, s.gradients.sum_of_squares());
  const auto norm = totals[1].sqrt();
  const auto skip = totals.isfinite().all().logical_not().to(at::kFloat);
  // Gradients are divided by max(1, norm / clip); a step that is skipped must not meet NaN on the way.
  auto scale = at::ones({}, norm.options());
  if (s.options.clip_grad > 0) scale = ((norm + 1e-6) / s.options.clip_grad).clamp_min(1.0).nan_to_num(1.0);
  s.optimizer.step(result.lr, scale.to(at::kFloat), skip);

  const auto host = totals.to(at::kCPU);  // the one place where the host waits for the device
  result.loss = host[0].item<double>();
  result.grad_norm = std::sqrt(host[1].item<double>());
  if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) {
    fail<NonFiniteError>("train_step: step ", result.iteration, ": the ",
                         std::isfinite(result.loss) ? "gradient norm" : "loss", " is ",
                         std::isfinite(result.loss) ? result.grad_norm : result.loss, "; no parameter was changed");
  }
  ++s.iteration;
  return result;
}

double Trainer::evaluate(const std::vector<ForwardInput>& micro_batches) {
  auto& s = *state_;
  const auto counts = count(micro_batches, s.model());
  for (auto& chunk : s.chunks) chunk->train(false);
  const auto loss = s.executor.evaluate(moved(micro_batches, s.model().device()),
                                        loss_weights(counts, s.options.calculate_per_token_loss));
  for (auto& chunk : s.chunks) chunk->train(true);
  return s.totals(loss, {})[0].item<double>();
}

}  // namespace mcore_bridge
