"""The planner's word at the start of a run: one line, a warning when the run will not fit, an error when it cannot."""

import os

import torch

GIB = 2**30
# Python, torch and its libraries, resident before any tensor.
CPU_PROCESS = 0.4e9


def device_memory():
    """Bytes this rank can use: its GPU's, or its share of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local


def round_up(length, config):
    """The row length padding makes of `length`."""
    context = config.context_parallel_size
    pieces = (2 * context if context > 1 else 1) * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    return -(-length // pieces) * pieces


def request(arguments, config, length, processes):
    """plan_layout's arguments for a training run of these flags."""
    from ..training.options import optimizer_options

    cuda = torch.cuda.is_available()
    return dict(
        processes=processes,
        micro_batch_size=arguments.micro_batch_size,
        global_batch_size=arguments.global_batch_size,
        sequence_length=round_up((arguments.packing_length or length) if arguments.packing else length, config),
        frozen=arguments.freeze_parameters,
        optimizer=optimizer_options(arguments),
        memory=float(device_memory()),
        gpu_kernels=cuda,
        **({} if cuda else dict(reserve=CPU_PROCESS)),
    )


def describe(memory, available):
    parts = dict(
        weights=memory["weights"],
        gradients=memory["gradients"],
        optimizer=memory["optimizer"],
        activations=memory["activations"],
        temporaries=memory["workspace"] + memory["communication"],
        reserve=memory["reserve"],
    )
    text = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"memory per rank, estimated: {text} = {memory['total'] / GIB:.2f} of {available / GIB:.1f} GiB"


def check_memory(arguments, config, processes):
    """Logs what the run needs. ValueError, on every rank alike, when the weights alone are larger than the memory."""
    from ..planner import nearest_fitting, plan_layout
    from ..utils import get_logger
    from .plan import flags_of, lora_options

    logger, lora = get_logger(), lora_options(arguments)
    length = arguments.max_length or min(config.max_position_embeddings or 8192, 8192)
    values = request(arguments, config, length, processes)
    plan = plan_layout(config, lora=lora, **values)
    worst = plan["stages"][plan["worst_stage"]]["memory"]
    logger.info(describe(worst, values["memory"]))
    if plan["fits"]:
        return plan
    nearest = nearest_fitting(config, lora=lora, **values)
    advice = (
        f"the nearest layout that fits: {flags_of(nearest)}"
        if nearest
        else "no layout of these processes fits: use more of them, LoRA, a shorter max_length or a smaller model"
    )
    if worst["weights"] > values["memory"]:
        raise ValueError(
            f"the weights of one rank alone take {worst['weights'] / GIB:.2f} GiB, there are {values['memory'] / GIB:.2f}; {advice}"
        )
    logger.warning(f"the estimate is larger than the memory; {advice}")
    return plan
