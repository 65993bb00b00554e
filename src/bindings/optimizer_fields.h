// The fields of OptimizerOptions by the names they have in Python; lr_mult, a map, is not among them.
#pragma once

#include "mcore_bridge/optimizer_options.h"

namespace mcore_bridge {

/// Calls take("lr", options.lr) and so on.
template <class Take>
void for_each_option(OptimizerOptions& options, Take&& take) {
#define MCB_OPTION(name) take(#name, options.name);
  MCB_OPTION(lr)
  MCB_OPTION(min_lr)
  MCB_OPTION(lr_decay_style)
  MCB_OPTION(lr_decay_iters)
  MCB_OPTION(lr_warmup_iters)
  MCB_OPTION(lr_warmup_init)
  MCB_OPTION(lr_wsd_decay_style)
  MCB_OPTION(lr_wsd_decay_iters)
  MCB_OPTION(train_iters)
  MCB_OPTION(weight_decay)
  MCB_OPTION(clip_grad)
  MCB_OPTION(adam_beta1)
  MCB_OPTION(adam_beta2)
  MCB_OPTION(adam_eps)
  MCB_OPTION(calculate_per_token_loss)
  MCB_OPTION(weight_decay_incr_style)
  MCB_OPTION(start_weight_decay)
  MCB_OPTION(end_weight_decay)
  MCB_OPTION(optimizer)
  MCB_OPTION(sgd_momentum)
  MCB_OPTION(muon_momentum)
  MCB_OPTION(muon_split_qkv)
  MCB_OPTION(muon_use_nesterov)
  MCB_OPTION(muon_scale_mode)
  MCB_OPTION(muon_num_ns_steps)
  MCB_OPTION(muon_coefficient_type)
  MCB_OPTION(muon_fp32_matmul_prec)
  MCB_OPTION(muon_tp_mode)
  MCB_OPTION(muon_extra_scale_factor)
  MCB_OPTION(muon_scalar_optimizer)
  MCB_OPTION(use_distributed_optimizer)
  MCB_OPTION(data_parallel_sharding_strategy)
  MCB_OPTION(overlap_grad_reduce)
  MCB_OPTION(overlap_param_gather)
  MCB_OPTION(ddp_bucket_size)
  MCB_OPTION(main_grads_dtype)
  MCB_OPTION(main_params_dtype)
  MCB_OPTION(store_param_remainders)
  MCB_OPTION(exp_avg_dtype)
  MCB_OPTION(exp_avg_sq_dtype)
  MCB_OPTION(optimizer_cpu_offload)
  MCB_OPTION(optimizer_offload_fraction)
  MCB_OPTION(cuda_graph_impl)
  MCB_OPTION(cuda_graph_warmup_steps)
  MCB_OPTION(loss_scale)
  MCB_OPTION(initial_loss_scale)
  MCB_OPTION(min_loss_scale)
  MCB_OPTION(loss_scale_window)
  MCB_OPTION(hysteresis)
#undef MCB_OPTION
}

}  // namespace mcore_bridge
