#include "mcore_bridge/trainer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <set>

#include "core/phase_timer.h"
#include "layers/finite_check.h"
#include "mcore_bridge/error.h"
#include "models/context_share.h"
#include "models/fp8.h"
#include "models/gathered_masters.h"
#include "models/gpt_model.h"
#include "parallel/together.h"
#include "train/complete_gradients.h"
#include "train/executor.h"
#include "train/parameter_buffers.h"
#include "train/sharded_optimizer.h"
#include "train/unit_gate.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kIgnore = -100;

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
  if (batch.packed && batch.input_ids.size(0) != 1)
    bad("a packed micro-batch is one row, input_ids has ", batch.input_ids.size(0));
  check_context_share(batch, model.config(), model.parallel(), "train_step: micro-batch " + std::to_string(index));
  const auto vocabulary = model.config().padded_vocab_size;
  if (batch.input_ids.is_cpu()) {
    const auto low = batch.input_ids.min().item<int64_t>(), high = batch.input_ids.max().item<int64_t>();
    if (low < 0 || high >= vocabulary)
      bad("input_ids holds ", low < 0 ? low : high, ", the vocabulary has ", vocabulary, " tokens");
  }
  if (batch.labels.is_cpu() && batch.labels.max().item<int64_t>() >= vocabulary)
    bad("labels holds ", batch.labels.max().item<int64_t>(), ", the vocabulary has ", vocabulary, " tokens");
}

/// Context-parallel ranks cut the same micro-batches; one that was given other ones would train on a mixture.
void check_same_batches(const std::vector<ForwardInput>& batches, const Group& cp) {
  if (cp.size() == 1) return;
  int64_t sum = static_cast<int64_t>(batches.size());
  for (const auto& batch : batches) {
    for (const auto& tensor : {batch.input_ids, batch.labels}) {
      const auto place = at::arange(1, tensor.numel() + 1, at::TensorOptions(tensor.device()).dtype(at::kLong));
      sum = sum * 31 + (tensor.flatten() * place).sum().item<int64_t>();
    }
  }
  auto both = at::tensor({sum, -sum}, at::kLong);
  cp.all_reduce_max(both);
  MCB_CHECK(both[0].item<int64_t>() == -both[1].item<int64_t>(),
            "train_step: the context-parallel ranks were given different micro-batches; give each of them the same, "
            "whole ones (the engine takes each rank's part)");
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
  together(parallel.world, [&] { check_same_batches(batches, parallel.cp); });
  counts.all_micro_batches = counts.micro_batches;
  if (parallel.dp.size() > 1) {
    auto sums = at::tensor({counts.tokens, counts.loss_tokens, counts.micro_batches}, at::kLong);
    parallel.dp.all_reduce(sums);
    counts.tokens = sums[0].item<int64_t>();
    counts.loss_tokens = sums[1].item<int64_t>();
    counts.all_micro_batches = sums[2].item<int64_t>();
    together(parallel.world, [&] {
      MCB_CHECK(counts.micro_batches * parallel.dp.size() == counts.all_micro_batches,
                "train_step: this data-parallel rank has ", counts.micro_batches, " micro-batches, all ",
                parallel.dp.size(), " together ", counts.all_micro_batches, "; every rank needs equally many");
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

/// This rank's parts, on its device.
std::vector<ForwardInput> shares(const std::vector<ForwardInput>& batches, const GPTModel& model) {
  std::vector<ForwardInput> result;
  for (const auto& batch : batches) result.push_back(moved(context_share(batch, model.parallel()), model.device()));
  return result;
}

bool finite(const at::Tensor& values) {
  const bool codes = values.scalar_type() == at::kFloat8_e4m3fn;  // which have no such operation
  return (codes ? values.to(at::kFloat) : values).isfinite().all().item<bool>();
}

/// What gradients are divided by: the loss scale times max(1, norm / clip). A step that is skipped must not meet NaN on
/// the way.
at::Tensor grad_scale(const at::Tensor& scaled_norm, double loss_scale, double clip) {
  if (clip <= 0) return at::full({}, loss_scale, scaled_norm.options().dtype(at::kFloat));
  const auto over = ((scaled_norm / loss_scale + 1e-6) / clip).clamp_min(1.0).nan_to_num(1.0, 1.0, 1.0);
  return (over * loss_scale).to(at::kFloat);
}

}  // namespace

struct Trainer::State {
  Chunks chunks;
  OptimizerOptions options;
  std::shared_ptr<ParameterBuffers> buffers;
  ShardedOptimizer optimizer;
  Executor executor;
  int64_t iteration = 0;

  State(Chunks given, OptimizerOptions opts)
      : chunks(std::move(given)),
        options(std::move(opts)),
        buffers(make_buffers()),
        optimizer(buffers, model().parallel_ptr(), options, model().config().fp16),
        executor(chunks, options) {
    forget_wide_weights(chunks);
  }
  ~State() { buffers->disconnect(); }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  const GPTModel& model() const { return *chunks.at(0); }

  std::vector<Router*> routers() const {
    std::vector<Router*> result;
    for (const auto& chunk : chunks) {
      for (auto* router : chunk->routers()) result.push_back(router);
    }
    return result;
  }

  std::shared_ptr<ParameterBuffers> make_buffers() {
    // Parameters that an earlier trainer spread out come together first.
    for (const auto& chunk : chunks) {
      if (chunk->gate()) chunk->gate()->hold({});
    }
    auto result =
        std::make_shared<ParameterBuffers>(managed_parameters(chunks), model().parallel_ptr(), buffer_options(options));
    for (size_t i = 0; i < chunks.size(); ++i)
      chunks[i]->set_gate(std::make_shared<UnitGate>(result, static_cast<int>(i), chunks[i]->units()));
    if (buffer_options(options).sharding == Sharding::kParameters) drop_fp8_weights(chunks);
    return result;
  }

  /// One rank per model replica's last stage reports the loss; the squares of all ranks add up.
  at::Tensor totals(const at::Tensor& loss, const at::Tensor& squares) const {
    const auto& parallel = model().parallel();
    auto result = at::zeros({2}, at::TensorOptions(model().device()).dtype(at::kDouble));
    if (parallel.is_last_stage() && parallel.tp.rank() == 0) result[0] += loss;
    if (squares.defined()) result[1] += squares.to(model().device());
    parallel.world.all_reduce(result);
    return result;
  }

  /// The loss is finite and the gradients are not: with loss scaling a step to skip. Throws where that cannot help.
  void judge(StepResult& result) const {
    if (std::isfinite(result.loss) && std::isfinite(result.grad_norm)) {
      result.skipped = result.spike;
      return;
    }
    result.spike = false;
    result.skipped = optimizer.scaler().skips() && std::isfinite(result.loss) && !optimizer.scaler().exhausted();
    if (result.skipped) return;
    const bool norm = std::isfinite(result.loss);
    fail<NonFiniteError>("train_step: step ", result.iteration, ": the ", norm ? "gradient norm" : "loss", " is ",
                         norm ? result.grad_norm : result.loss,
                         norm && optimizer.scaler().skips() ? " at the smallest loss scale" : "",
                         "; no parameter was changed");
  }
};

void finish_gradients(const Chunks& chunks) {
  at::NoGradGuard no_grad;
  const auto& parallel = chunks.at(0)->parallel();
  std::vector<GradientPiece> pieces;
  for (const auto& parameter : managed_parameters(chunks)) {
    if (!parameter.trainable) continue;
    auto tensor = parameter.tensor;
    auto& grad = tensor.mutable_grad();
    if (!grad.defined()) grad = at::zeros_like(tensor);
    pieces.push_back({grad.view({-1}), 0, grad.numel(), row_elements(tensor), parameter.traits});
  }
  complete_gradients(pieces, parallel);
  for (auto& piece : pieces) parallel.replicas(piece.traits.expert).all_reduce(piece.values);
}

Trainer::Trainer(Chunks chunks, OptimizerOptions options) {
  options.validate();
  const auto needed = chunks.empty() ? 1 : chunks[0]->config().virtual_stages();
  MCB_CHECK(static_cast<int64_t>(chunks.size()) == needed, "Trainer: needs all ", needed,
            " model chunks of this rank (one per virtual pipeline stage, as get_mcore_model returns them), found ",
            chunks.size());
  check_fp8_param(managed_parameters(chunks), options);
  // Fully sharded weights lie in buckets, which leave no room; a CPU gains nothing.
  if (buffer_options(options).sharding != Sharding::kParameters && chunks[0]->device().is_cuda()) {
    for (auto& chunk : chunks) chunk->make_room_for_adapters();
  }
  const GatheredMasters earlier(chunks);  // those of a trainer before this one
  state_ = std::make_unique<State>(std::move(chunks), std::move(options));
}

Trainer::~Trainer() = default;

int64_t Trainer::iteration() const { return state_->iteration; }

void Trainer::set_iteration(int64_t iteration) {
  MCB_CHECK(iteration >= 0, "Trainer: iteration ", iteration, " is negative");
  state_->iteration = iteration;
}

const Chunks& Trainer::chunks() const { return state_->chunks; }

Optimizer& Trainer::optimizer() { return state_->optimizer; }

std::map<std::string, int64_t> Trainer::memory() const {
  std::map<std::string, int64_t> result{{"optimizer", state_->optimizer.device_bytes()},
                                        {"optimizer_host", state_->optimizer.host_bytes()}};
  for (const auto& bucket : state_->buffers->buckets()) {
    result["parameters"] += bucket->param_bytes();
    result["gradients"] += bucket->grad_bytes();
  }
  return result;
}

std::map<std::string, int64_t> Trainer::cuda_graphs() const {
  const auto* graphs = state_->executor.graphs();
  return {{"recorded", graphs ? graphs->recorded() : 0}, {"replayed", graphs ? graphs->replayed() : 0}};
}

StepResult Trainer::train_step(const std::vector<ForwardInput>& micro_batches, double loss_limit) {
  auto& s = *state_;
  const auto counts = count(micro_batches, s.model());
  // Graphs bring them to the device themselves.
  auto batches = s.executor.graphs() ? micro_batches : shares(micro_batches, s.model());
  const double loss_scale = s.optimizer.scaler().scale();
  const bool per_token = s.options.calculate_per_token_loss;
  auto weights = loss_weights(counts, per_token);
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i] *= loss_scale;
    const auto own = counts.own_loss_tokens[i];
    batches[i].balance_loss_share = weights[i] * static_cast<double>(per_token ? own : std::max<int64_t>(1, own));
  }
  const auto update = s.iteration + 1 - s.optimizer.skipped;  // skipped steps do not advance the schedules
  StepResult result{.iteration = s.iteration + 1,
                    .lr = learning_rate(s.options, update),
                    .tokens = counts.tokens,
                    .loss_tokens = counts.loss_tokens,
                    .weight_decay = weight_decay(s.options, update),
                    .loss_scale = loss_scale};

  s.optimizer.take_over();
  for (auto& chunk : s.chunks) chunk->train(true);
  s.buffers->begin(static_cast<int>(batches.size()));
  const auto loss = s.executor.train(batches, weights);
  {
    const TimedPhase timed(Phase::kCommunication, s.model().device());
    s.buffers->finish_gradients();
  }

  const TimedPhase timed(Phase::kOptimizer, s.model().device());
  at::NoGradGuard no_grad;
  const auto totals = s.totals(loss, s.buffers->sum_of_squares());
  const double limit = loss_limit * loss_scale;
  auto bad = totals.isfinite().all().logical_not();
  if (std::isfinite(limit)) bad = bad.logical_or(totals[0] > limit);
  const auto skip = bad.to(at::kFloat);
  const auto scale = grad_scale(totals[1].sqrt(), loss_scale, s.options.clip_grad);
  auto publish = [&] {
    note_weights_written(/*frozen=*/false);
    s.optimizer.quantize();
    update_fp8_scales(s.chunks);
    s.buffers->gather_parameters();
  };
  s.optimizer.step(result.lr, result.weight_decay, scale, skip);
  if (!s.optimizer.offloads()) publish();

  const auto host =
      at::stack({totals[0], totals[1], scale.to(at::kDouble)}).to(at::kCPU);  // the one wait for the device
  result.loss = host[0].item<double>() / loss_scale;
  result.grad_norm = std::sqrt(host[1].item<double>()) / loss_scale;
  result.spike = host[0].item<double>() > limit;
  s.judge(result);
  s.optimizer.finish_on_host(host[2].item<double>(), result.skipped);
  if (s.optimizer.offloads()) publish();
  update_expert_biases(s.routers(), s.model().parallel(), result.skipped);
  s.optimizer.scaler().update(!result.skipped || result.spike);
  s.optimizer.skipped += result.skipped;
  result.skipped_steps = s.optimizer.skipped;
  ++s.iteration;
  return result;
}

std::vector<std::string> Trainer::diagnose(const std::vector<ForwardInput>& micro_batches) {
  constexpr size_t kMost = 8;
  auto& s = *state_;
  const at::NoGradGuard no_grad;
  std::vector<std::string> found;
  // Of a parameter that is shared out each rank looks at its part.
  std::set<std::string> parameters, gradients;
  auto look = [](const Bucket& bucket, const at::Tensor& shard, std::set<std::string>& bad) {
    if (!shard.defined() || finite(shard)) return;
    for (const auto& entry : bucket.entries()) {
      const auto first = std::max(entry.offset, bucket.begin());
      const auto last = std::min(entry.offset + entry.elements(), bucket.end());
      if (first < last && !finite(shard.narrow(0, first - bucket.begin(), last - first)))
        bad.insert(entry.parameter->name);
    }
  };
  for (const auto& bucket : s.buffers->buckets()) {
    look(*bucket, bucket->param_shard(), parameters);
    look(*bucket, bucket->grad_shard(), gradients);
  }
  auto tell = [&](const std::set<std::string>& names, const char* what) {
    if (names.empty()) return;
    auto text = std::to_string(names.size()) + " " + what + " hold NaN or Inf: ";
    size_t count = 0;
    for (const auto& name : names) {
      if (++count <= kMost) text += (count > 1 ? ", " : "") + name;
    }
    found.push_back(text + (count > kMost ? ", ..." : ""));
  };
  tell(parameters, "parameters");
  tell(gradients, "gradients");
  const auto batches = shares(micro_batches, s.model());
  for (size_t i = 0; i < batches.size(); ++i) {
    const FiniteCheck check;
    s.executor.evaluate({batches[i]}, {1.0});
    if (!check.first().empty()) {
      found.push_back("forward of micro-batch " + std::to_string(i) + ": " + check.first() +
                      " is the first whose output holds NaN or Inf");
    }
  }
  return found;
}

double Trainer::evaluate(const std::vector<ForwardInput>& micro_batches) {
  auto& s = *state_;
  const auto counts = count(micro_batches, s.model());
  for (auto& chunk : s.chunks) chunk->train(false);
  const auto loss =
      s.executor.evaluate(shares(micro_batches, s.model()), loss_weights(counts, s.options.calculate_per_token_loss));
  for (auto& chunk : s.chunks) chunk->train(true);
  return s.totals(loss, {})[0].item<double>();
}

}  // namespace mcore_bridge
