"""mcore-bridge export: merge, cast, re-shard."""

from pathlib import Path

from .arguments import ExportArguments, parse
from .launch import finish_distributed, init_distributed


def run(command, argv):
    arguments = parse(ExportArguments, command, argv)
    import mcore_bridge as mb

    from .session import build_config, load_adapter, resolve_model, side_files

    if not arguments.output_dir:
        raise ValueError("--output_dir is missing")
    if Path(arguments.output_dir).exists() and not arguments.exist_ok:
        raise ValueError(f"--output_dir {arguments.output_dir} exists; --exist_ok true replaces its weights")
    if arguments.merge_lora and not arguments.adapters:
        raise ValueError("--merge_lora true needs --adapters DIR")
    if arguments.adapters and not arguments.merge_lora:
        raise ValueError("--adapters DIR: an adapter is exported by merging it; add --merge_lora true")
    init_distributed()
    folder = resolve_model(arguments.model)
    config = build_config(arguments, folder)
    models = mb.get_mcore_model(config, device="cpu")
    config.bridge.load_weights(models, folder)
    if arguments.adapters:
        load_adapter(models, config, arguments.adapters[0])
    leader = mb.get_parallel_state().rank == 0
    config.bridge.save_weights(
        models, arguments.output_dir, merge_lora=arguments.merge_lora, max_shard_size=arguments.max_shard_size,
        extra_files=side_files(folder, config, arguments.rope_scaling) if leader else {},
    )  # fmt: skip
    if leader:
        print(f"wrote {arguments.output_dir}", flush=True)
    finish_distributed()
    return 0
