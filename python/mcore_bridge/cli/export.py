"""mcore-bridge export: a new checkpoint from an old one, without a GPU and without holding the model."""

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

from .arguments import ExportArguments, parse


@contextmanager
def byte_progress(text):
    """progress(done, total) in bytes as a bar with speed and time left; silent when nobody watches."""
    from tqdm import tqdm

    with tqdm(desc=text, unit="B", unit_scale=True, disable=None) as bar:

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _check(arguments):
    if arguments.to_mcore and arguments.to_hf:
        raise ValueError("--to_mcore and --to_hf exclude each other")
    if arguments.merge_lora and not arguments.adapters:
        raise ValueError("--merge_lora true needs --adapters DIR")
    if arguments.adapters and not arguments.merge_lora:
        raise ValueError("--adapters DIR: an adapter is exported by merging it; add --merge_lora true")
    if len(arguments.adapters) > 1:
        raise ValueError("--adapters: one at a time; merge the next into the result")
    if (arguments.to_mcore or arguments.to_hf) and (arguments.quantize or arguments.merge_lora):
        raise ValueError("--to_mcore and --to_hf convert alone; merge or quantise in a run of its own on the Hugging Face side")
    if arguments.to_hf != bool(arguments.mcore_model):
        raise ValueError("--to_hf true needs --mcore_model DIR" if arguments.to_hf else "--mcore_model DIR needs --to_hf true")
    if arguments.test_convert_precision and not (arguments.to_mcore or arguments.to_hf):
        raise ValueError("--test_convert_precision true goes with --to_mcore or --to_hf; mcore-bridge verify compares otherwise")
    if not arguments.output_dir and (arguments.to_mcore or arguments.to_hf):
        source = (arguments.mcore_model if arguments.to_hf else arguments.model) or ""
        arguments.output_dir = f"{source.rstrip('/')}-{'hf' if arguments.to_hf else 'mcore'}"
    if not arguments.output_dir:
        raise ValueError("--output_dir is missing")
    if Path(arguments.output_dir).exists() and not arguments.exist_ok:
        raise ValueError(f"--output_dir {arguments.output_dir} exists; --exist_ok true replaces its weights")


def _convert(arguments):
    from ..bridge import convert_checkpoint
    from .session import resolve_model, side_files, with_rope_scaling

    folder = resolve_model(arguments.model)
    if os.path.realpath(folder) == os.path.realpath(arguments.output_dir):
        raise ValueError(f"--output_dir {arguments.output_dir} is the model itself, which stays as it is; name another folder")
    files = side_files(folder)
    if arguments.rope_scaling:
        content = with_rope_scaling(json.loads(files["config.json"]), arguments.rope_scaling)
        files["config.json"] = (json.dumps(content, indent=2) + "\n").encode()
    with byte_progress("Exporting") as progress:
        return convert_checkpoint(
            folder,
            arguments.output_dir,
            torch_dtype=arguments.torch_dtype,
            dequantize=arguments.dequantize,
            quantize=arguments.quantize,
            adapter=arguments.adapters[0] if arguments.adapters else None,
            max_shard_size=arguments.max_shard_size,
            extra_files=files,
            progress=progress,
        )["bytes_written"]


def _config(arguments, folder):
    """The model's config on one process; nothing is split."""
    from .session import build_config

    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        if getattr(arguments, name) != 1:
            raise ValueError(f"--{name}: a torch_dist checkpoint fits every layout; converting needs none")
    return build_config(arguments, folder)


def _to_mcore(arguments):
    from ..megatron import to_megatron
    from .session import resolve_model, side_files

    folder = resolve_model(arguments.model)
    with byte_progress("To Megatron") as progress:
        return to_megatron(
            _config(arguments, folder), folder, arguments.output_dir, side_files(folder), progress, replace=arguments.exist_ok
        )


def _to_hf(arguments):
    from ..bridge import parse_size
    from ..megatron import from_megatron
    from .session import model_folder, side_files

    folder = model_folder(arguments)
    config = _config(arguments, folder)
    with byte_progress("To Hugging Face") as progress:
        return from_megatron(
            config,
            arguments.mcore_model,
            arguments.output_dir,
            parse_size(arguments.max_shard_size),
            side_files(folder, config, arguments.rope_scaling),
            progress,
        )


def _same_logits(arguments):
    """Transformers on the Hugging Face side against the engine on the Megatron side."""
    import torch

    import mcore_bridge as mb

    from ..megatron import load_megatron
    from .session import resolve_model
    from .verify import reference_logits

    hf = arguments.output_dir if arguments.to_hf else resolve_model(arguments.model)
    megatron = arguments.mcore_model if arguments.to_hf else arguments.output_dir
    arguments.torch_dtype = arguments.test_convert_dtype
    if mb.model_parallel_is_initialized():
        mb.destroy_model_parallel()
    config = _config(arguments, hf)
    models = mb.get_mcore_model(config)
    load_megatron(models, megatron)
    for model in models:
        model.eval()
    rows = [torch.randint(0, config.padded_vocab_size, (1, 64), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    expected = reference_logits(hf, [], config.params_dtype, rows)
    tolerance = 2e-5 if arguments.test_convert_dtype == "float32" else 2e-2
    worst = 0.0
    for row, theirs in zip(rows, expected):
        mine = mb.forward_logits(models, row).float().cpu()
        worst = max(worst, ((mine - theirs).double().norm() / theirs.double().norm()).item())
    good = worst <= tolerance
    print(f"{'ok' if good else 'FAILED'}: relative difference of logits {worst:.2e}, tolerance {tolerance:g}", flush=True)
    return good


def run(command, argv):
    arguments = parse(ExportArguments, command, argv)
    if int(os.environ.get("RANK", 0)):
        return 0  # launched by torchrun: the threads of rank 0 do it all
    _check(arguments)
    start = time.monotonic()
    work = _to_mcore if arguments.to_mcore else _to_hf if arguments.to_hf else _convert
    written = work(arguments)
    seconds = time.monotonic() - start
    print(f"wrote {arguments.output_dir}: {written / 1e9:.2f} GB in {seconds:.1f} s", flush=True)
    return int(arguments.test_convert_precision and not _same_logits(arguments))
