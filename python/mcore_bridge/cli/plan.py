"""mcore-bridge plan: memory, communication and time of a run, and the layouts that serve it best, from config.json alone."""

import json
import os

from ..training.options import new_adapter, optimizer_options
from .arguments import PlanArguments, parse
from .session import SIZES, adapter_options, config_fields_of

# Columns the table needs.
WIDTH = 136


def config_file(model):
    """config.json of a folder, the file itself, or the one file of a hub model."""
    if not model:
        raise ValueError("--model is missing")
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    if os.path.isfile(path):
        return path
    if os.path.exists(os.path.dirname(path) or ".") and (path.startswith(("/", ".", "~")) or path.endswith("config.json")):
        raise FileNotFoundError(f"--model {model}: no config.json there")
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(model, "config.json")
    except Exception as error:
        raise FileNotFoundError(f"--model {model}: neither here nor a hub model that can be fetched: {error}") from None


def hardware(arguments):
    """The row of the hardware table with the numbers given in its place; units of the flags are TFLOP/s and GB/s."""
    given = dict(
        peak_flops=arguments.peak_tflops and arguments.peak_tflops * 1e12,
        memory_bandwidth=arguments.memory_bandwidth and arguments.memory_bandwidth * 1e9,
        link_bandwidth=arguments.link_bandwidth and arguments.link_bandwidth * 1e9,
        network_bandwidth=arguments.network_bandwidth and arguments.network_bandwidth * 1e9,
        gpus_per_node=arguments.gpus_per_node,
        matmul_efficiency=arguments.matmul_efficiency,
    )
    return {"name": arguments.hardware, **{key: value for key, value in given.items() if value is not None}}


def lora_options(arguments):
    """The adapter a run of these flags trains; None with full training."""
    if arguments.adapters:
        return adapter_options(arguments.adapters[0])
    return new_adapter(arguments) if arguments.tuner_type == "lora" else None


def request(arguments, config):
    """What the planner needs besides the config."""
    longest = min(config.max_position_embeddings or 8192, 8192)
    length = arguments.max_length or longest
    return dict(
        processes=arguments.gpus,
        micro_batch_size=arguments.micro_batch_size or 1,
        global_batch_size=arguments.global_batch_size,
        sequence_length=(arguments.packing_length or length) if arguments.packing else length,
        documents=arguments.documents_per_row,
        frozen=arguments.freeze_parameters,
        optimizer=optimizer_options(arguments),
        hardware=hardware(arguments),
    )


def make_plans(arguments):
    """(config, plans) of the flags: the one layout when every size is fixed, else the best ones."""
    from ..bridge import parse_size
    from ..config import ModelConfig, hf_to_mcore_config
    from ..planner import search_layouts

    path = config_file(arguments.model)
    given = {name: getattr(arguments, name) for name in SIZES if getattr(arguments, name) is not None}
    fixed = list(given)
    for name in ("micro_batch_size", "recompute_granularity", "sequence_parallel"):
        if getattr(arguments, name) is not None:
            fixed.append(name)
    fields = config_fields_of(arguments, hf_to_mcore_config(path), path)
    # Sizes that are searched start at one process; the others must be possible for the model.
    # Experts need it with tensor parallelism.
    split_tokens = bool(fields.get("num_moe_experts")) if arguments.sequence_parallel is None else arguments.sequence_parallel
    config = ModelConfig(**{**fields, "sequence_parallel": split_tokens, **given})
    memory = {}
    if arguments.gpu_memory:
        memory["memory"] = parse_size(str(arguments.gpu_memory))
    plans = search_layouts(
        config, fixed=fixed, count=arguments.top, lora=lora_options(arguments), **request(arguments, config), **memory
    )
    return config, plans


def gib(count):
    return f"{count / 2**30:.1f}"


def layout_of(plan):
    """ "TP 8, PP 4, DP 2, SP": the sizes above 1."""
    layout = plan["layout"]
    sizes = dict(zip(("TP", "PP", "VPP", "CP", "EP"), (layout[name] for name in SIZES)), DP=layout["data_parallel_size"])
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return ", ".join(words + ["SP"] * layout["sequence_parallel"]) or "one GPU"


def print_table(plans, title, console):
    from rich.table import Table

    table = Table(title=title)
    for heading in ("", "layout", "recompute"):
        table.add_column(heading, no_wrap=True)
    for heading in ("micro", "weights", "grads", "optim.", "activ.", "other", "GiB", "bubble", "s/step", "tokens/s", "MFU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, plan in enumerate(plans, 1):
        memory = plan["stages"][plan["worst_stage"]]["memory"]
        other = memory["workspace"] + memory["communication"] + memory["reserve"]
        table.add_row(
            f"{index}" if plan["fits"] else "too big",
            layout_of(plan),
            plan["layout"]["recompute_granularity"],
            str(plan["layout"]["micro_batch_size"]),
            *[gib(memory[name]) for name in ("weights", "gradients", "optimizer", "activations")],
            gib(other),
            gib(memory["total"]),
            f"{100 * plan['bubble_fraction']:.1f}%",
            f"{plan['seconds']['step']:.3g}",
            f"{plan['tokens_per_second']:,.0f}",
            f"{100 * plan['mfu']:.0f}%",
            style=None if plan["fits"] else "dim",
        )
    console.print(table)


def flags_of(plan):
    """The flags of sft and pt that ask for a plan's layout."""
    layout = plan["layout"]
    words = [f"--{name} {layout[name]}" for name in SIZES if layout[name] != 1]
    if layout["sequence_parallel"]:
        words.append("--sequence_parallel true")
    if layout["account_for_embedding_and_loss_in_pipeline_split"]:
        words.append("--account_for_embedding_in_pipeline_split true --account_for_loss_in_pipeline_split true")
    if layout["recompute_granularity"] != "none":
        words.append(f"--recompute_granularity {layout['recompute_granularity']}")
    return " ".join(
        [*words, f"--micro_batch_size {layout['micro_batch_size']} --global_batch_size {layout['global_batch_size']}"]
    )


def print_explanation(plan, console):
    console.print("\nThe best layout, formula by formula (worst stage; times are estimates from data sheets):")
    for name, text in plan["explanation"]:
        console.print(f"  {name}: {text}", highlight=False, soft_wrap=True)


def run(command, argv):
    arguments = parse(PlanArguments, command, argv)
    if not arguments.gpus or arguments.gpus < 1:
        raise ValueError("--gpus: how many GPUs (processes) are there?")
    config, plans = make_plans(arguments)
    if arguments.json:
        print(json.dumps(plans, indent=2))
        return 0 if plans[0]["fits"] else 1
    from rich.console import Console

    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    kind = f"LoRA r={arguments.lora_rank}" if lora_options(arguments) else "full training"
    console.print(
        f"{config.hf_model_type}: {config.num_layers} layers, hidden {config.hidden_size}; {kind}, {arguments.gpus:,} x {arguments.hardware}, "
        f"global batch {arguments.global_batch_size}",
        highlight=False,
    )
    print_table(plans, "memory: GiB on the worst rank; times: estimates", console)
    best = plans[0]
    if best["fits"]:
        console.print(f"flags of the best: {flags_of(best)}", highlight=False, soft_wrap=True)
    else:
        console.print("No layout fits: use more GPUs, --recompute_granularity full, LoRA, or a shorter --max_length.")
    if arguments.explain:
        print_explanation(best, console)
    return 0 if best["fits"] else 1
