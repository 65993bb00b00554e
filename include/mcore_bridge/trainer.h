// One training step per call: micro-batches, pipeline, gradient reduction, clipping, optimizer.
#pragma once

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "mcore_bridge/bridge.h"
#include "mcore_bridge/optimizer_options.h"

namespace mcore_bridge {

struct StepResult {
  int64_t iteration = 0;  ///< 1-based, the step just done
  double loss = 0;        ///< mean over the global batch's tokens; the same on all ranks
  double grad_norm = 0;   ///< before clipping, over all ranks; Inf or NaN of a skipped step
  double lr = 0;
  int64_t tokens = 0;       ///< tokens in the global batch (padding included)
  int64_t loss_tokens = 0;  ///< tokens that carry loss
  double weight_decay = 0;
  double loss_scale = 1;  ///< what gradients were scaled by (float16)
  bool skipped = false;   ///< nothing was updated: a spike, or (float16) gradients overflowed and the scale goes down
  bool spike = false;     ///< the loss was above the limit
  int64_t skipped_steps = 0;  ///< so far
};

/// For training loops of one's own, after backward: completes `.grad` of every trainable parameter over the
/// model-parallel ranks and sums it over the data-parallel ones. Collective. Parameters without a gradient count as
/// zero.
void finish_gradients(const Chunks& chunks);

/// For training loops of one's own, after the optimizer's step, when fp8_recipe is delayed: the step's largest
/// magnitudes join the history that the next step's scales come from (Trainer does it itself; without it every tensor
/// is scaled for its own largest magnitude). Collective.
void update_fp8_scales(const Chunks& chunks);

class Optimizer;  // train/optimizer_state.h

class Trainer {
 public:
  Trainer(Chunks chunks, OptimizerOptions options);
  ~Trainer();
  /// `micro_batches`: this data-parallel rank's share of the global batch, the same on all its tensor, context and
  /// pipeline ranks (whole: each context-parallel rank takes its part by itself) and equally many on every
  /// data-parallel rank. `labels` must be given. Throws NonFiniteError on all ranks together, naming the step, before
  /// any parameter changes. With float16 a step whose gradients overflow is skipped instead, until the loss scale
  /// cannot go lower; so is a step whose loss is above `loss_limit` (decided on the device).
  StepResult train_step(const std::vector<ForwardInput>& micro_batches, double loss_limit = INFINITY);
  /// Mean loss without gradients.
  double evaluate(const std::vector<ForwardInput>& micro_batches);
  /// After a step that threw NonFiniteError: what on this rank is not finite, a line each (parameters, gradients, and,
  /// by running the micro-batches again layer by layer, the first output). Collective.
  std::vector<std::string> diagnose(const std::vector<ForwardInput>& micro_batches);
  int64_t iteration() const;
  /// For a run that goes on: steps done so far.
  void set_iteration(int64_t iteration);
  const Chunks& chunks() const;
  /// Its state, for checkpoints.
  Optimizer& optimizer();
  /// Bytes this rank keeps: "parameters", "gradients", "optimizer", "optimizer_host".
  std::map<std::string, int64_t> memory() const;
  /// Of cuda_graph_impl: graphs "recorded" and micro-batches "replayed" so far.
  std::map<std::string, int64_t> cuda_graphs() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mcore_bridge
