"""What the engine is told of a run's flags: training and planning say the same."""

# Flags that the engine's optimizer knows by the same name.
OPTIMIZER_OPTIONS = [
    "lr_mult", "weight_decay_incr_style", "start_weight_decay", "end_weight_decay", "optimizer", "sgd_momentum", "muon_momentum",
    "muon_split_qkv", "muon_use_nesterov", "muon_scale_mode", "muon_num_ns_steps", "muon_coefficient_type", "muon_fp32_matmul_prec",
    "muon_tp_mode", "muon_extra_scale_factor", "muon_scalar_optimizer", "use_distributed_optimizer", "data_parallel_sharding_strategy",
    "overlap_grad_reduce", "overlap_param_gather", "ddp_bucket_size", "main_grads_dtype", "main_params_dtype",
    "store_param_remainders", "exp_avg_dtype",
    "exp_avg_sq_dtype", "optimizer_cpu_offload", "optimizer_offload_fraction", "initial_loss_scale", "min_loss_scale",
    "loss_scale_window", "hysteresis", "cuda_graph_impl", "cuda_graph_warmup_steps",
]  # fmt: skip


def optimizer_options(arguments):
    """Trainer options beside the learning rate's and AdamW's."""
    return {name: getattr(arguments, name) for name in OPTIMIZER_OPTIONS}


def new_adapter(arguments):
    """LoraOptions of an adapter that begins with this run."""
    from ..lora import LoraOptions

    return LoraOptions(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_rslora=arguments.use_rslora,
        target_modules=arguments.target_modules,
        target_regex=arguments.target_regex,
        modules_to_save=arguments.modules_to_save,
        seed=arguments.seed,
    )
