"""Flags of ms-swift's megatron commands that this version takes only with a value that changes nothing."""

# By flag: the values taken; [] means the flag must stay out, None that every value does (it chooses between ways to the same
# result, or tunes a mechanism that the engine does not have).
NEUTRAL = {
    # model and weights
    "save_safetensors": [True], "bridge_backend": ["mcore-bridge"], "check_model": None, "use_hf": None, "hub_token": None, "model_type": [],
    "task_type": ["causal_lm"], "num_labels": [], "problem_type": [], "mrl_dims": [], "new_special_tokens": [],
    "mcore_adapter": [], "ref_model": [], "ref_adapters": [], "save_missing_weights": [False], "offload_bridge": [False],
    "language_model_only": [False], "linear_decoupled_in_proj": [False], "apply_wd_to_qk_layernorm": [False],
    # recomputation, fusions, memory
    "manual_gc": None,
    "manual_gc_steps": None, "manual_gc_eval": None, "attention_backend": None, "masked_softmax_fusion": None, "bias_dropout_fusion": None,
    "bias_activation_fusion": None, "apply_rope_fusion": None, "gradient_accumulation_fusion": None, "cross_entropy_loss_fusion": None,
    "cross_entropy_fusion_impl": None,
    # data and templates
    "load_from_cache_file": None, "lazy_tokenize": [False], "cached_dataset": [], "cached_val_dataset": [],
    "dataloader_persistent_workers": None,
    "packing_num_proc": None, "data_sharding": [False], "group_by_length": [False],
    "mlp_padding_free": [False], "remove_unused_columns": None,
    "model_name": [], "model_author": [], "custom_dataset_info": [], "external_plugins": [],
    "te_rng_tracker": None, "data_parallel_random_init": [False], "template": [], "is_binary_loss_scale": [], "agent_template": [],
    "max_pixels": [], "norm_bbox": [], "padding_side": ["right"], "enable_thinking": [], "response_prefix": [], "model_kwargs": [],
    # optimizer
    "optimizer_cuda_graph": [False], "use_precision_aware_optimizer": None, "vit_lr": [], "aligner_lr": [],
    # checkpoints
    "use_persistent_ckpt_worker": None, "use_cpu_initialization": None, "dist_ckpt_save_pre_mcore_014": None,
    "dist_ckpt_optim_fully_reshardable": None, "distrib_optim_fully_reshardable_mem_efficient": None, "device_map": None,
    # parallelism
    "overlap_param_gather_with_optimizer_step": None, "align_param_gather": None, "align_grad_reduce": None,
    "overlap_p2p_comm": None, "batch_p2p_comm": None, "nccl_comm_warmup": None,
    "cp_partition_mode": ["zigzag"], "sequence_packing_scheduler": [], "ddp_backend": None, "ddp_timeout": None,
    # logging
    "tensorboard_queue_size": None,
    "callbacks": [],
    # precision, experts, further heads
    "fp16": [], "bf16": [], "attention_softmax_in_fp32": None, "apply_query_key_layer_scaling": [False],
    "fp4_format": [], "fp4_recipe": None, "fp4_param_gather": [False],
    "moe_enable_deepep": [False], "moe_grouped_gemm": None, "moe_permute_fusion": None,
    "moe_layer_recompute": [False], "moe_shared_expert_overlap": None, "dsa_indexer_loss_coeff": ["0", "0.0"],
    "dsa_indexer_use_sparse_loss": [False], "apply_dsa_kernel_fusion": None, "csa_dense_mode": [False], "use_fused_mhc": None,
    "mhc_recompute_layer_num": [], "mtp_num_layers": [0], "mtp_loss_scaling_factor": None, "mtp_decoder_input_detach": [False],
    "mtp_shared_weights": [False],
    # tuning
    "lora_bias": ["none"], "lora_dtype": [], "freeze_llm": [False], "freeze_vit": None, "freeze_aligner": None,
    "freeze_parameters_ratio": ["0", "0.0"], "vit_gradient_checkpointing": None, "vit_gradient_checkpointing_kwargs": None,
    "vit_attn_impl": None, "enable_dft_loss": [False], "enable_channel_loss": [False],
}  # fmt: skip
