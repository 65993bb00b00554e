// What a Trainer's optimizer does. Names and defaults are Megatron's.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace mcore_bridge {

struct OptimizerOptions {
  // Learning rate and regularisation.
  double lr = 1e-4;
  double min_lr = 0.0;
  std::string lr_decay_style = "cosine";  ///< constant | linear | cosine | inverse-square-root | WSD
  int64_t lr_decay_iters = 0;             ///< 0: train_iters
  int64_t lr_warmup_iters = 0;
  double lr_warmup_init = 0.0;
  std::string lr_wsd_decay_style = "exponential";  ///< linear | cosine | exponential | minus_sqrt
  int64_t lr_wsd_decay_iters = 0;
  int64_t train_iters = 0;
  /// (regular expression, factor): parameters whose name it is found in learn at factor * lr. The first match counts.
  std::vector<std::pair<std::string, double>> lr_mult;
  double weight_decay = 0.1;                              ///< not applied to norms and biases
  std::string weight_decay_incr_style = "constant";       ///< constant | linear | cosine, over train_iters
  double start_weight_decay = -1, end_weight_decay = -1;  ///< of the other two styles
  double clip_grad = 1.0;                                 ///< 0: no clipping
  bool calculate_per_token_loss = true;                   ///< false: mean over micro-batches of each one's mean

  std::string optimizer = "adam";  ///< adam (AdamW) | sgd | muon (dist_muon is the same)
  double adam_beta1 = 0.9, adam_beta2 = 0.95, adam_eps = 1e-8;
  double sgd_momentum = 0.9;
  double muon_momentum = 0.9;
  bool muon_split_qkv = true;  ///< q, k, v (and gate, up) are matrices of their own
  bool muon_use_nesterov = false;
  std::string muon_scale_mode = "spectral";       ///< spectral | unit_rms_norm | shape_scaling
  int64_t muon_num_ns_steps = 5;                  ///< Newton-Schulz iterations
  std::string muon_coefficient_type = "quintic";  ///< simple | quintic | polar_express
  std::string muon_fp32_matmul_prec = "medium";   ///< medium (bf16) | high (TF32) | highest (fp32)
  std::string muon_tp_mode = "blockwise";         ///< blockwise | distributed | duplicated
  double muon_extra_scale_factor = 1.0;
  std::string muon_scalar_optimizer = "adam";  ///< adam | sgd: what vectors, embeddings and output layers get

  // Where gradients, parameters and states live, and in which dtype: fp32 | bf16 | fp16.
  bool use_distributed_optimizer = true;  ///< states and their update shared out over the data-parallel ranks
  /// no_shard | optim | optim_grads | optim_grads_params; empty: optim or no_shard, as use_distributed_optimizer says.
  std::string data_parallel_sharding_strategy;
  bool overlap_grad_reduce = false, overlap_param_gather = false;
  int64_t ddp_bucket_size = 40'000'000;    ///< elements of a bucket that overlaps with others
  std::string main_grads_dtype = "fp32";   ///< fp32 | bf16: gradients are added up and reduced in it
  std::string main_params_dtype = "fp32";  ///< fp32 | bf16 (parameters are updated as they are, no master weights)
  /// bf16 parameters: an fp32 master is the parameter and the 16 bits it lacks, 2 bytes in place of 4.
  bool store_param_remainders = false;
  std::string exp_avg_dtype = "fp32", exp_avg_sq_dtype = "fp32";
  bool optimizer_cpu_offload = false;
  double optimizer_offload_fraction = 1.0;  ///< share of the states kept in host memory and updated there

  /// none | local: forward and backward of a micro-batch become one CUDA graph for each shape that comes back.
  std::string cuda_graph_impl = "none";
  int64_t cuda_graph_warmup_steps = 3;  ///< micro-batches of a shape before it is recorded

  // float16: the loss is scaled so that small gradients survive.
  double loss_scale = 0;  ///< 0: dynamic
  double initial_loss_scale = 4294967296.0, min_loss_scale = 1.0;
  int64_t loss_scale_window = 1000;  ///< good steps before it doubles
  int64_t hysteresis = 2;            ///< bad steps before it halves

  /// The sharding meant: data_parallel_sharding_strategy with its default filled in.
  std::string sharding() const;
  void validate() const;
};

/// Learning rate of the 1-based step `iteration`, as Megatron computes it.
double learning_rate(const OptimizerOptions& options, int64_t iteration);
/// Weight decay of that step.
double weight_decay(const OptimizerOptions& options, int64_t iteration);

}  // namespace mcore_bridge
