#include "mcore_bridge/optimizer_options.h"

#include <cmath>
#include <regex>

#include "core/one_of.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

void check_combinations(const OptimizerOptions& o) {
  const bool muon = o.optimizer == "muon" || o.optimizer == "dist_muon";
  const auto sharding = o.sharding();
  MCB_CHECK(!muon || sharding == "no_shard" || sharding == "optim", "optimizer: ", o.optimizer,
            " needs whole matrices, data_parallel_sharding_strategy ", sharding, " cuts them; use optim");
  MCB_CHECK(!muon || !o.optimizer_cpu_offload, "optimizer: ", o.optimizer,
            " orthogonalises matrices on the GPU; optimizer_cpu_offload is for adam and sgd");
  MCB_CHECK(!o.store_param_remainders || o.main_params_dtype == "fp32", "store_param_remainders: main_params_dtype ",
            o.main_params_dtype, " keeps no fp32 masters that could be stored so; use one of them");
  MCB_CHECK(!o.store_param_remainders || !muon, "store_param_remainders: ", o.optimizer,
            " updates whole masters; use adam or sgd");
  MCB_CHECK(!o.store_param_remainders || !o.optimizer_cpu_offload,
            "store_param_remainders: optimizer_cpu_offload keeps whole masters in host memory; use one of them");
  MCB_CHECK(!o.overlap_grad_reduce || sharding == "optim" || sharding == "no_shard",
            "overlap_grad_reduce: data_parallel_sharding_strategy ", sharding, " overlaps by itself; leave it out");
  MCB_CHECK(!o.overlap_param_gather || sharding == "optim" || sharding == "optim_grads",
            "overlap_param_gather: with data_parallel_sharding_strategy ", sharding,
            sharding == "no_shard" ? " nothing is gathered" : " gathers overlap by themselves", "; leave it out");
  if (o.cuda_graph_impl != "none") {
    MCB_CHECK(sharding == "optim" || sharding == "no_shard", "cuda_graph_impl: data_parallel_sharding_strategy ",
              sharding, " communicates between layers, which is not recorded; use optim or no_shard");
    MCB_CHECK(!o.overlap_grad_reduce && !o.overlap_param_gather,
              "cuda_graph_impl: ", o.overlap_grad_reduce ? "overlap_grad_reduce" : "overlap_param_gather",
              " communicates between layers, which is not recorded; use one of them");
  }
  MCB_CHECK(o.weight_decay_incr_style == "constant" || (o.start_weight_decay >= 0 && o.end_weight_decay >= 0),
            "weight_decay_incr_style: ", o.weight_decay_incr_style, " needs start_weight_decay and end_weight_decay");
  MCB_CHECK(o.weight_decay_incr_style == "constant" || o.train_iters > 0,
            "weight_decay_incr_style: ", o.weight_decay_incr_style, " needs train_iters");
  for (const auto& [pattern, factor] : o.lr_mult) {
    MCB_CHECK(std::isfinite(factor) && factor >= 0, "lr_mult: '", pattern, "': ", factor,
              " is no factor of a learning rate");
    try {
      std::regex regex(pattern);
    } catch (const std::regex_error& error) {
      fail("lr_mult: '", pattern, "' is no regular expression: ", error.what());
    }
  }
}

}  // namespace

std::string OptimizerOptions::sharding() const {
  if (!data_parallel_sharding_strategy.empty()) return data_parallel_sharding_strategy;
  return use_distributed_optimizer ? "optim" : "no_shard";
}

void OptimizerOptions::validate() const {
  one_of("lr_decay_style", lr_decay_style, {"constant", "linear", "cosine", "inverse-square-root", "WSD"});
  one_of("weight_decay_incr_style", weight_decay_incr_style, {"constant", "linear", "cosine"});
  one_of("optimizer", optimizer, {"adam", "sgd", "muon", "dist_muon"});
  one_of("muon_scale_mode", muon_scale_mode, {"spectral", "unit_rms_norm", "shape_scaling"});
  one_of("muon_coefficient_type", muon_coefficient_type, {"simple", "quintic", "polar_express"});
  one_of("muon_fp32_matmul_prec", muon_fp32_matmul_prec, {"medium", "high", "highest"});
  one_of("muon_tp_mode", muon_tp_mode, {"blockwise", "distributed", "duplicated"});
  one_of("muon_scalar_optimizer", muon_scalar_optimizer, {"adam", "sgd"});
  one_of("data_parallel_sharding_strategy", sharding(), {"no_shard", "optim", "optim_grads", "optim_grads_params"});
  one_of("main_grads_dtype", main_grads_dtype, {"fp32", "bf16"});
  one_of("main_params_dtype", main_params_dtype, {"fp32", "bf16"});
  one_of("exp_avg_dtype", exp_avg_dtype, {"fp32", "bf16", "fp16"});
  MCB_CHECK(exp_avg_sq_dtype != "fp16",
            "exp_avg_sq_dtype: fp16 turns squares of gradients below 2e-4 into zero, and updates explode; use bf16");
  one_of("exp_avg_sq_dtype", exp_avg_sq_dtype, {"fp32", "bf16"});
  MCB_CHECK(cuda_graph_impl != "transformer_engine",
            "cuda_graph_impl: 'transformer_engine' records layers of that library, which this engine does not use; use "
            "local, which records whole micro-batches");
  one_of("cuda_graph_impl", cuda_graph_impl, {"none", "local"});
  MCB_CHECK(cuda_graph_warmup_steps > 0, "cuda_graph_warmup_steps: ", cuda_graph_warmup_steps,
            " must be at least 1: libraries prepare themselves in it");
  one_of("lr_wsd_decay_style", lr_wsd_decay_style, {"linear", "cosine", "exponential", "minus_sqrt"});
  auto at_least = [](const char* field, double value, double least) {
    MCB_CHECK(std::isfinite(value) && value >= least, field, ": ", value, " must be a number of at least ", least);
  };
  at_least("lr", lr, 0);
  at_least("min_lr", min_lr, 0);
  at_least("lr_warmup_init", lr_warmup_init, 0);
  at_least("weight_decay", weight_decay, 0);
  at_least("clip_grad", clip_grad, 0);
  at_least("adam_eps", adam_eps, 0);
  MCB_CHECK(min_lr <= lr, "min_lr: ", min_lr, " is above lr ", lr);
  MCB_CHECK(lr_warmup_init <= lr, "lr_warmup_init: ", lr_warmup_init, " is above lr ", lr);
  MCB_CHECK(adam_beta1 >= 0 && adam_beta1 < 1, "adam_beta1: ", adam_beta1, " must be in [0, 1)");
  MCB_CHECK(adam_beta2 >= 0 && adam_beta2 < 1, "adam_beta2: ", adam_beta2, " must be in [0, 1)");
  MCB_CHECK(train_iters >= 0 && lr_decay_iters >= 0 && lr_warmup_iters >= 0 && lr_wsd_decay_iters >= 0,
            "train_iters, lr_decay_iters, lr_warmup_iters and lr_wsd_decay_iters must not be negative");
  const auto decay = lr_decay_iters ? lr_decay_iters : train_iters;
  MCB_CHECK(lr_decay_style == "constant" || decay > 0, "train_iters: the learning-rate schedule '", lr_decay_style,
            "' needs train_iters or lr_decay_iters");
  MCB_CHECK(lr_decay_style == "constant" || lr_warmup_iters < decay, "lr_warmup_iters: ", lr_warmup_iters,
            " leaves nothing of the ", decay, " iterations to decay");
  MCB_CHECK(lr_decay_style != "WSD" || (lr_wsd_decay_iters > 0 && lr_wsd_decay_iters <= decay),
            "lr_wsd_decay_iters: ", lr_wsd_decay_iters, " must be between 1 and the ", decay,
            " iterations of the schedule");
  MCB_CHECK(sgd_momentum >= 0 && sgd_momentum < 1, "sgd_momentum: ", sgd_momentum, " must be in [0, 1)");
  MCB_CHECK(muon_momentum >= 0 && muon_momentum < 1, "muon_momentum: ", muon_momentum, " must be in [0, 1)");
  MCB_CHECK(muon_num_ns_steps > 0 && muon_num_ns_steps < 100, "muon_num_ns_steps: ", muon_num_ns_steps,
            " must be between 1 and 99");
  MCB_CHECK(optimizer_offload_fraction >= 0 && optimizer_offload_fraction <= 1,
            "optimizer_offload_fraction: ", optimizer_offload_fraction, " must be between 0 and 1");
  MCB_CHECK(ddp_bucket_size > 0, "ddp_bucket_size: ", ddp_bucket_size, " must be at least 1");
  MCB_CHECK(loss_scale >= 0 && min_loss_scale > 0 && initial_loss_scale >= min_loss_scale,
            "initial_loss_scale: ", initial_loss_scale, " must be at least min_loss_scale ", min_loss_scale,
            ", which is positive");
  MCB_CHECK(loss_scale_window > 0 && hysteresis > 0, "loss_scale_window and hysteresis must be at least 1");
  check_combinations(*this);
}

}  // namespace mcore_bridge
