// The gate of a mixture of experts: which experts each token goes to.
#pragma once

#include <optional>
#include <vector>

#include "layers/module.h"
#include "layers/moe/routing.h"
#include "mcore_bridge/model_config.h"
#include "parallel/parallel_state.h"

namespace mcore_bridge {

/// What a router chose, to be chosen again: one int64 [t, k] per forward, t being this rank's tokens of the
/// micro-batch. Recomputed forwards count once; their choices come in the order of the first ones, as every pipeline
/// schedule runs backwards in the order of the forwards.
struct RouterReplay {
  bool recording = false;
  std::vector<at::Tensor> recorded;
  std::vector<at::Tensor> given;  ///< empty: the router chooses itself
  size_t next = 0, next_again = 0;
};

class Router : public Module {
 public:
  Router(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options);
  std::string kind() const override { return "TopKRouter"; }
  /// weight [E, h], bias [E] with add_bias_linear (float32 with moe_router_weight_in_fp32), and the buffer expert_bias
  /// (float32 [E], no gradient).
  std::vector<NamedParameter> own_parameters() const override;

  struct Output {
    Routing routing;
    int64_t capacity = 0;  ///< most places of an expert; 0: no limit
  };
  /// Of the tokens this rank routes; the weights themselves count where they are used (Dispatcher::footprint).
  Footprint footprint(const ActivationShape& shape) const override;
  /// Most places of an expert among `tokens` of this rank and as many of each rank that shares the micro-batch; 0: no
  /// limit.
  int64_t capacity(int64_t tokens) const;
  /// Bytes of a score.
  int64_t score_element() const { return compute_dtype_ == at::kDouble ? 8 : 4; }
  bool trains() const { return weight_.requires_grad(); }
  /// The expert bias moves after a step: loads of so many experts are summed then.
  int64_t summed_loads() const { return bias_update_rate_ > 0 && trains() ? options_.experts : 0; }

  /// x [s, b, h] -> the experts and weights of its s * b tokens. `loss_share`: what this micro-batch counts in the
  /// global batch's loss, the share its balance losses are added with while training. Collective over tensor and
  /// context ranks when they share tokens of a micro-batch and something is counted over them.
  Output forward(const at::Tensor& x_sbh, double loss_share);

  RouterReplay& replay() { return replay_; }

 private:
  friend void update_expert_biases(const std::vector<Router*>& routers, const ParallelState& parallel, bool skip);

  at::Tensor choose(const at::Tensor& logits, const at::Tensor& scores);
  at::Tensor replayed(int64_t tokens);
  /// The sum of the balance losses asked for (undefined: none), this rank's share of each.
  at::Tensor balance_losses(const at::Tensor& logits, const at::Tensor& scores, const at::Tensor& experts,
                            int64_t sequences) const;
  void drop(Output& output) const;

  ParallelStatePtr parallel_;
  RoutingOptions options_;
  bool sum_over_tp_, sinkhorn_ = false, forced_;
  c10::ScalarType compute_dtype_;
  double aux_coefficient_ = 0, sequence_aux_coefficient_ = 0, global_aux_coefficient_ = 0, z_coefficient_ = 0;
  double bias_update_rate_ = 0;
  std::optional<double> capacity_factor_;
  bool drop_by_weight_ = true;
  at::Tensor weight_, bias_, expert_bias_;
  at::Tensor load_;  ///< int64 [E]: places since the last optimizer step (expert bias, global aux loss)
  RouterReplay replay_;
};

/// After an optimizer step: moves the expert biases of routers that train towards an even load (arXiv:2408.15664): bias
/// += rate * sign(mean load - load), loads counted over the global batch; `skip`: only forgets the loads. Collective
/// over tensor, context and data-parallel ranks.
void update_expert_biases(const std::vector<Router*>& routers, const ParallelState& parallel, bool skip);

}  // namespace mcore_bridge
