#include "layers/moe/router.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>

#include <algorithm>
#include <cmath>

#include "layers/moe/router_logits.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

/// Inside a backward pass a forward is a recomputation.
bool again() { return torch::autograd::get_current_node() != nullptr; }

c10::ScalarType weight_dtype(const ModelConfig& config) {
  return config.moe_router_weight_in_fp32 ? at::kFloat : config.params_dtype;
}

c10::ScalarType compute_dtype(const ModelConfig& config) {
  const auto name = config.moe_router_dtype.value_or("none");
  return name == "fp64" ? at::kDouble : name == "fp32" ? at::kFloat : weight_dtype(config);
}

at::Tensor own_rows(const at::Tensor& all, const Group& group) {
  const auto count = all.size(0) / group.size();
  return all.narrow(0, count * group.rank(), count);
}

}  // namespace

Router::Router(const ModelConfig& config, ParallelStatePtr parallel, at::TensorOptions tensor_options)
    : parallel_(std::move(parallel)),
      options_{.experts = *config.num_moe_experts,
               .topk = config.moe_router_topk,
               .sigmoid = config.moe_router_score_function == "sigmoid",
               .normalise = !config.moe_router_pre_softmax,
               .scaling = config.moe_router_topk_scaling_factor.value_or(1.0),
               .groups = config.moe_router_num_groups.value_or(0),
               .group_topk = config.moe_router_group_topk.value_or(0),
               .smallest_sum = config.moe_router_norm_min},
      sum_over_tp_(config.sequence_parallel && parallel_->tp.size() > 1),
      forced_(config.moe_router_force_load_balancing),
      compute_dtype_(compute_dtype(config)),
      z_coefficient_(config.moe_z_loss_coeff.value_or(0)),
      bias_update_rate_(config.moe_router_enable_expert_bias ? config.moe_router_bias_update_rate : 0),
      capacity_factor_(config.moe_expert_capacity_factor),
      drop_by_weight_(config.moe_token_drop_policy == "probs") {
  const auto& kinds = config.moe_router_load_balancing_type;
  const auto& coefficients = config.moe_aux_loss_coeff;
  for (size_t i = 0; i < kinds.size(); ++i) {
    const auto coefficient = coefficients.empty() ? 0.0 : coefficients[std::min(i, coefficients.size() - 1)];
    if (kinds[i] == "aux_loss") aux_coefficient_ = coefficient;
    if (kinds[i] == "seq_aux_loss") sequence_aux_coefficient_ = coefficient;
    if (kinds[i] == "global_aux_loss") global_aux_coefficient_ = coefficient;
    if (kinds[i] == "sinkhorn") sinkhorn_ = true;
  }
  const auto own_options = tensor_options.dtype(weight_dtype(config));
  weight_ = at::empty({options_.experts, config.hidden_size}, own_options).requires_grad_(true);
  if (config.add_bias_linear) bias_ = at::empty({options_.experts}, own_options).requires_grad_(true);
  if (config.moe_router_enable_expert_bias)
    expert_bias_ = at::zeros({options_.experts}, tensor_options.dtype(at::kFloat));
  if (bias_update_rate_ > 0 || global_aux_coefficient_ > 0)
    load_ = at::zeros({options_.experts}, tensor_options.dtype(at::kLong));
}

std::vector<NamedParameter> Router::own_parameters() const {
  std::vector<NamedParameter> result{{"weight", weight_, {.sum_over_tp = sum_over_tp_}}};
  if (bias_.defined()) result.push_back({"bias", bias_, {.sum_over_tp = sum_over_tp_, .no_weight_decay = true}});
  if (expert_bias_.defined()) result.push_back({"expert_bias", expert_bias_, {.buffer = true}});
  return result;
}

at::Tensor Router::replayed(int64_t tokens) {
  auto& place = again() ? replay_.next_again : replay_.next;
  MCB_CHECK(place < replay_.given.size(), "router replay: ", replay_.given.size(),
            " choices were given, this is forward ", place + 1);
  const auto& experts = replay_.given[place++];
  MCB_CHECK(experts.dim() == 2 && experts.size(0) == tokens && experts.size(1) == options_.topk,
            "router replay: experts are ", experts.sizes(), ", this forward needs [", tokens, ", ", options_.topk, "]");
  return experts.to(weight_.device(), at::kLong);
}

at::Tensor Router::choose(const at::Tensor& logits, const at::Tensor& scores) {
  if (!replay_.given.empty()) return replayed(scores.size(0));
  if (forced_) return experts_in_turn(scores, options_);
  if (!sinkhorn_ || !training()) return best_experts(scores, expert_bias_, options_);
  // Balanced over all tokens of the micro-batch, whichever ranks hold them.
  const auto& spread = parallel_->tp_cp;
  return own_rows(sinkhorn_experts(spread.all_gather(logits.detach()), options_), spread);
}

at::Tensor Router::balance_losses(const at::Tensor& logits, const at::Tensor& scores, const at::Tensor& experts,
                                  int64_t sequences) const {
  // Sequence and context parallelism spread the tokens of a micro-batch: loads are counted over all of them, while each
  // rank differentiates the scores of its own.
  const auto& spread = parallel_->tp_cp;
  const auto tokens = static_cast<double>(scores.size(0) * spread.size());
  at::Tensor total;
  auto add = [&](const at::Tensor& loss) { total = total.defined() ? total + loss : loss; };
  auto load_of = [&](const at::Tensor& chosen) {
    auto load = tokens_per_expert(chosen, options_.experts).contiguous();
    spread.all_reduce(load);
    return load;
  };
  // Sigmoid scores as a distribution, as softmax scores are.
  const bool balances = aux_coefficient_ > 0 || sequence_aux_coefficient_ > 0 || global_aux_coefficient_ > 0;
  const auto shares = balances && options_.sigmoid ? scores / (scores.sum(-1, true) + 1e-20) : scores;
  if (aux_coefficient_ > 0) add(balance_loss(shares, load_of(experts), tokens, options_.topk) * aux_coefficient_);
  if (sequence_aux_coefficient_ > 0) {
    const auto count = static_cast<double>(sequences);
    const auto by_sequence = shares.view({-1, sequences, options_.experts});
    const auto chosen = experts.view({-1, sequences, options_.topk});
    for (int64_t i = 0; i < sequences; ++i) {
      add(balance_loss(by_sequence.select(1, i), load_of(chosen.select(1, i)), tokens / count, options_.topk) *
          (sequence_aux_coefficient_ / count));
    }
  }
  if (global_aux_coefficient_ > 0) {
    auto load = load_.clone();
    spread.all_reduce(load);
    parallel_->dp.all_reduce(load);
    // Loads of all micro-batches so far stand for this one's: scaled to its number of tokens.
    const auto share = load.to(scores.scalar_type()) * (tokens * static_cast<double>(options_.topk)) / load.sum();
    add(balance_loss(shares, share, tokens, options_.topk) * global_aux_coefficient_);
  }
  if (z_coefficient_ > 0) add(z_loss(logits, tokens) * z_coefficient_);
  return total;
}

int64_t Router::capacity(int64_t tokens) const {
  if (!capacity_factor_) return 0;
  const auto places = tokens * options_.topk * parallel_->tp_cp.size();
  const auto mean = static_cast<double>(places) / static_cast<double>(options_.experts);
  return static_cast<int64_t>(std::ceil(mean * *capacity_factor_));
}

void Router::drop(Output& output) const {
  auto& [experts, weights] = output.routing;
  const auto& spread = parallel_->tp_cp;
  output.capacity = capacity(experts.size(0));
  const auto dropped = own_rows(over_capacity(spread.all_gather(experts), spread.all_gather(weights.detach()),
                                              options_.experts, output.capacity, drop_by_weight_),
                                spread);
  experts = experts.masked_fill(dropped, options_.experts);
  weights = weights.masked_fill(dropped, 0);
}

Router::Output Router::forward(const at::Tensor& x_sbh, double loss_share) {
  const auto x = x_sbh.flatten(0, 1);
  auto logits = router_logits(x, weight_, bias_, compute_dtype_);
  if (logits.scalar_type() != at::kDouble) logits = logits.to(at::kFloat);
  const auto scores = router_scores(logits, options_);
  Output output{weighted_by_scores(scores, choose(logits, scores), options_)};
  const auto& experts = output.routing.experts;
  if (replay_.recording && !again()) replay_.recorded.push_back(experts);
  if (training() && at::GradMode::is_enabled()) {
    if (load_.defined()) load_.add_(tokens_per_expert(experts, options_.experts));
    const auto loss = balance_losses(logits, scores, experts, x_sbh.size(1));
    if (loss.defined()) output.routing.weights = with_loss(output.routing.weights, loss, loss_share);
  }
  if (capacity_factor_) drop(output);
  return output;
}

Footprint Router::footprint(const ActivationShape& shape) const {
  const auto tokens = shape.tokens(), experts = options_.experts, k = options_.topk, score = score_element();
  const int64_t hidden = weight_.size(1), spread = parallel_->tp_cp.size();
  const bool grad = shape.input_grad || trains() || (bias_.defined() && bias_.requires_grad());
  Footprint result{.output_grad = grad};
  const auto flops = 2.0 * static_cast<double>(tokens) * static_cast<double>(weight_.numel());
  result.forward_flops = flops;
  result.backward_flops = flops * ((shape.input_grad ? 1 : 0) + (trains() ? 1 : 0));
  // The input once more in the precision of the scores, where tensor cores do not do without.
  result.workspace = tokens * hidden * (shape.fused && score == 4 ? 0 : score) + tokens * hidden * shape.element;

  auto& forward = result.experts_forward.tensor_context;
  if (sinkhorn_ && !forced_) forward += Traffic::all_gather(tokens * spread * experts * score, spread);
  if (capacity_factor_) {
    forward += Traffic::all_gather(tokens * spread * k * 8, spread);
    forward += Traffic::all_gather(tokens * spread * k * score, spread);
  }
  // Loads are counted once a micro-batch, with the graph: a forward that is only for recomputing counts none.
  const int64_t loads = (aux_coefficient_ > 0 ? 1 : 0) + (sequence_aux_coefficient_ > 0 ? shape.batch : 0);
  const int64_t global = global_aux_coefficient_ > 0 ? 1 : 0;
  auto& backward = result.experts_backward;
  backward.tensor_context += Traffic::all_reduce(experts * 8, spread) * (loads + global);
  backward.data += Traffic::all_reduce(experts * 8, parallel_->dp.size()) * global;
  if (!grad) return result;

  result.saved = result.offloaded = trains() && !shape.input_kept ? tokens * hidden * shape.element : 0;
  result.saved += tokens * experts * score + tokens * k * 8;  // scores, which of them
  if (options_.normalise) result.saved += tokens * (k + 1 + (options_.smallest_sum > 0 ? 1 : 0)) * score;
  if (options_.sigmoid && loads + global > 0) result.saved += tokens * score;
  result.saved += (loads + global) * experts * score;
  if (z_coefficient_ > 0) result.saved += tokens * (experts + 1) * score;
  if (loads + global > 0 || z_coefficient_ > 0) result.saved += score;  // the loss
  if (capacity_factor_) result.saved += tokens * spread * k;            // what is dropped
  return result;
}

void update_expert_biases(const std::vector<Router*>& routers, const ParallelState& parallel, bool skip) {
  at::NoGradGuard no_grad;
  std::vector<Router*> moving;
  std::vector<at::Tensor> loads;
  for (auto* router : routers) {
    if (!router->load_.defined()) continue;
    // A frozen router (LoRA) keeps its bias: the base model does not change.
    if (router->summed_loads() > 0 && !skip) {
      moving.push_back(router);
      loads.push_back(router->load_);
    }
  }
  if (!moving.empty()) {
    auto all = at::cat(loads);
    parallel.tp_cp.all_reduce(all);
    parallel.dp.all_reduce(all);
    int64_t at = 0;
    for (auto* router : moving) {
      const auto load = all.narrow(0, at, router->options_.experts).to(at::kFloat);
      at += router->options_.experts;
      router->expert_bias_.add_((load.mean() - load).sign(), router->bias_update_rate_);
    }
  }
  for (auto* router : routers) {
    if (router->load_.defined()) router->load_.zero_();
  }
}

}  // namespace mcore_bridge
