// One training step per call: micro-batches, pipeline, gradient reduction, clipping, optimizer.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "mcore_bridge/bridge.h"

namespace mcore_bridge {

struct OptimizerOptions {
  double lr = 1e-4;
  double min_lr = 0.0;
  std::string lr_decay_style = "cosine";  ///< constant | linear | cosine | inverse-square-root | WSD
  int64_t lr_decay_iters = 0;             ///< 0: train_iters
  int64_t lr_warmup_iters = 0;
  double lr_warmup_init = 0.0;
  std::string lr_wsd_decay_style = "exponential";  ///< linear | cosine | exponential | minus_sqrt
  int64_t lr_wsd_decay_iters = 0;
  int64_t train_iters = 0;
  double weight_decay = 0.1;
  double clip_grad = 1.0;  ///< 0: no clipping
  double adam_beta1 = 0.9, adam_beta2 = 0.95, adam_eps = 1e-8;
  bool calculate_per_token_loss = true;  ///< false: mean over micro-batches of each one's mean
  void validate() const;
};

/// Learning rate of the 1-based step `iteration`, as Megatron computes it.
double learning_rate(const OptimizerOptions& options, int64_t iteration);

struct StepResult {
  int64_t iteration = 0;  ///< 1-based, the step just done
  double loss = 0;        ///< mean over the global batch's tokens; the same on all ranks
  double grad_norm = 0;   ///< before clipping, over all ranks
  double lr = 0;
  int64_t tokens = 0;       ///< tokens in the global batch (padding included)
  int64_t loss_tokens = 0;  ///< tokens that carry loss
};

/// For training loops of one's own, after backward: completes `.grad` of every trainable parameter over the
/// model-parallel ranks and sums it over the data-parallel ones. Collective. Parameters without a gradient count as
/// zero.
void finish_gradients(const Chunks& chunks);

class Optimizer;  // train/optimizer_state.h

class Trainer {
 public:
  Trainer(Chunks chunks, OptimizerOptions options);
  ~Trainer();
  /// `micro_batches`: this data-parallel rank's share of the global batch, the same on all its tensor and pipeline
  /// ranks and equally many on every data-parallel rank. `labels` must be given. Throws NonFiniteError on all ranks
  /// together, naming the step, before any parameter changes.
  StepResult train_step(const std::vector<ForwardInput>& micro_batches);
  /// Mean loss without gradients.
  double evaluate(const std::vector<ForwardInput>& micro_batches);
  int64_t iteration() const;
  /// Its state, for checkpoints.
  Optimizer& optimizer();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mcore_bridge
