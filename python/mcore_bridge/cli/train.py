"""mcore-bridge sft | pt."""

import os
from pathlib import Path

from .arguments import TrainArguments, parse
from .launch import finish_distributed, init_distributed


def _derived(arguments, command):
    """Defaults that depend on other flags, and combinations that make no sense."""
    from ..training.profile import parse_steps
    from ..training.reporters import check

    if arguments.use_chat_template is None:
        arguments.use_chat_template = command == "sft"
    if arguments.loss_scale is None:
        arguments.loss_scale = "default" if command == "sft" else "all"
    if arguments.adapters:
        arguments.tuner_type = "lora"
        if len(arguments.adapters) > 1:
            raise ValueError("--adapters: one adapter at a time")
    if arguments.data_parallel_sharding_strategy is None and arguments.use_megatron_fsdp:
        arguments.data_parallel_sharding_strategy = "optim_grads_params"
    if not arguments.accumulate_allreduce_grads_in_fp32:
        arguments.main_grads_dtype = "bf16"
    if arguments.lr is None:
        arguments.lr = 1e-4 if arguments.tuner_type == "lora" else 1e-5
    if arguments.train_iters is None and arguments.num_train_epochs is None:
        arguments.num_train_epochs = 1
    if arguments.save_total_limit is not None and arguments.save_total_limit < 1:
        raise ValueError(f"save_total_limit {arguments.save_total_limit} must be at least 1")
    for name in ("save_steps", "logging_steps", "micro_batch_size", "global_batch_size", "distributed_timeout_minutes"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} {getattr(arguments, name)} must be at least 1")
    for name in ("dataloader_num_workers", "loss_spike_threshold"):
        if getattr(arguments, name) < 0:
            raise ValueError(f"{name} {getattr(arguments, name)} must not be negative")
    if arguments.finetune is False and not arguments.resume_from_checkpoint:
        raise ValueError("--finetune false means to go on with a run: name it with --resume_from_checkpoint")
    if arguments.tuner_type == "lora" and arguments.perform_initialization:
        raise ValueError("an adapter needs real weights below it: --perform_initialization goes with --tuner_type full")
    if arguments.system and arguments.system.endswith(".txt") and os.path.isfile(arguments.system):
        arguments.system = Path(arguments.system).read_text(encoding="utf-8").strip()
    check(arguments.report_to)
    if arguments.profile:
        parse_steps(arguments.profile)
    if arguments.output_dir is None:
        arguments.output_dir = str(Path("megatron_output") / Path(arguments.model or arguments.mcore_model or "model").name)
    return arguments


def run(command, argv):
    arguments = _derived(parse(TrainArguments, command, argv), command)
    from ..training.run import Run
    from .session import model_folder

    init_distributed(arguments.distributed_timeout_minutes)
    folder = model_folder(arguments)
    Run(arguments, folder).train()
    finish_distributed()
    return 0
