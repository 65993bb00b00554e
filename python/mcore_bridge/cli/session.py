"""What the commands share: the model folder, the config, the model with its weights, the files beside the weights."""

import json
import os
from pathlib import Path

import torch

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".msgpack", ".h5")
LARGEST_SIDE_FILE = 200 << 20


def resolve_model(model):
    """A local folder for a path or hub id."""
    if not model:
        raise ValueError("--model is missing")
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or path.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"--model {model}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.msgpack", "*.h5", "original/*"])
    except Exception as error:
        raise FileNotFoundError(f"--model {model}: neither a folder here nor a hub model that can be fetched: {error}") from None


def model_folder(arguments):
    """The folder with config.json and tokenizer: --model, or what the checkpoint of --mcore_model carries."""
    if arguments.model or not arguments.mcore_model:
        return resolve_model(arguments.model)
    from ..megatron import side_folder

    folder = side_folder(arguments.mcore_model)
    if not (folder / "config.json").exists():
        raise ValueError(f"--mcore_model {arguments.mcore_model}: carries no config.json; name the model with --model")
    return str(folder)


def default_dtype(folder):
    """The dtype config.json (of a folder, or itself) names; float32 when it names none or none we train in."""
    with open(os.path.join(folder, "config.json") if os.path.isdir(folder) else folder, encoding="utf-8") as file:
        config = json.load(file)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)

# Fields of flags that only training and planning have.
RUN_FIELDS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "cpu_offloading",
    "cpu_offloading_num_layers",
    "fp8_recipe",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "deterministic_mode",
)

MOE_FIELDS = (
    "expert_tensor_parallel_size",
    "moe_token_dispatcher_type",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_expert_capacity_factor",
    "moe_token_drop_policy",
    "moe_pad_expert_input_to_capacity",
)


def config_fields_of(arguments, fields, folder, **more):
    """ModelConfig fields of this run but the parallel sizes: what config.json says (`fields`), then the flags. `more` and
    megatron_extra_kwargs have the last word."""
    if arguments.rope_scaling:
        fields["rope_scaling"] = arguments.rope_scaling
    flags = dict(
        params_dtype=arguments.torch_dtype or default_dtype(folder),
        sequence_parallel=arguments.sequence_parallel,
        cp_comm_type=arguments.cp_comm_type,
        tp_comm_overlap=arguments.tp_comm_overlap,
        num_layers_in_first_pipeline_stage=arguments.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=arguments.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=arguments.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=arguments.account_for_loss_in_pipeline_split,
        num_layers_per_virtual_pipeline_stage=arguments.num_layers_per_virtual_pipeline_stage,
        microbatch_group_size_per_vp_stage=arguments.microbatch_group_size_per_vp_stage,
        pipeline_model_parallel_layout=arguments.pipeline_model_parallel_layout,
        pipeline_schedule=arguments.pipeline_schedule,
    )
    experts = MOE_FIELDS if fields.get("num_moe_experts") else ()
    for name in (*RUN_FIELDS, *experts):
        if hasattr(arguments, name):
            flags[name] = getattr(arguments, name)
    if hasattr(arguments, "fp8_format"):
        flags["fp8"] = arguments.fp8_format
        flags["fp8_param"] = arguments.fp8_param_gather
    return {**fields, **flags, **more, **arguments.megatron_extra_kwargs}


def build_config(arguments, folder):
    """initialize_model_parallel and the ModelConfig of this run. A layout that cannot work is refused here, before anything is
    read or built, with the nearest one that can."""
    import mcore_bridge as mb

    from ..utils import get_dist_setting

    sizes = {name: getattr(arguments, name) for name in SIZES}
    fields = config_fields_of(arguments, {**mb.hf_to_mcore_config(folder), **sizes}, folder)
    run = {name: getattr(arguments, name) for name in ("micro_batch_size", "global_batch_size") if hasattr(arguments, name)}
    # Before the processes are looked at: errors about the model, not the machine.
    mb.check_layout(fields, processes=get_dist_setting()[2], **run)
    config = mb.ModelConfig(**fields)
    sizes["expert_tensor_parallel_size"] = config.expert_tensor_parallel_size
    sizes["virtual_pipeline_model_parallel_size"] = config.virtual_pipeline_model_parallel_size  # a layout decides it, too
    mb.initialize_model_parallel(**sizes, distributed_timeout_minutes=getattr(arguments, "distributed_timeout_minutes", 30))
    return config


def sequence_multiples(config, state):
    """(what the length of a row must be a multiple of, and that of each document in it): context parallelism cuts documents into
    2 * cp chunks, sequence parallelism a rank's part into tp."""
    document = 2 * state.cp_size if state.cp_size > 1 else 1
    return document * (state.tp_size if config.sequence_parallel else 1), document


def adapter_options(folder):
    """LoraOptions of a PEFT folder's adapter_config.json."""
    import mcore_bridge as mb

    path = Path(folder) / "adapter_config.json"
    if not path.exists():
        raise FileNotFoundError(f"--adapters {folder}: holds no adapter_config.json")
    peft = json.loads(path.read_text())
    if peft.get("peft_type") != "LORA" or peft.get("use_dora") or peft.get("rank_pattern") or peft.get("alpha_pattern"):
        raise ValueError(
            f"--adapters {folder}: only plain LoRA adapters are supported by this version (no DoRA, no rank or alpha patterns)"
        )
    if peft.get("bias", "none") != "none" or peft.get("layers_to_transform"):
        raise ValueError(f"--adapters {folder}: bias and layers_to_transform are not supported by this version")
    targets = peft["target_modules"]
    return mb.LoraOptions(
        r=peft["r"],
        lora_alpha=peft["lora_alpha"],
        lora_dropout=peft.get("lora_dropout", 0.0),
        use_rslora=peft.get("use_rslora", False),
        target_modules=[] if isinstance(targets, str) and targets != "all-linear" else targets,
        target_regex=targets if isinstance(targets, str) and targets != "all-linear" else None,
        modules_to_save=peft.get("modules_to_save") or [],
    )


def load_adapter(models, config, folder):
    """Adds the adapter of a PEFT folder and loads its weights; returns its options."""
    import mcore_bridge as mb

    options = adapter_options(folder)
    mb.add_lora(models, options)
    config.bridge.load_weights(models, folder, peft_format=True)
    return options


def with_rope_scaling(content, scaling):
    """config.json's content with its RoPE scaling replaced, in the key it uses (the base stays)."""
    scaling = {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
    base = content.get("rope_parameters") or {}
    if "rope_parameters" in content:
        kept = {key: base[key] for key in ("rope_theta", "partial_rotary_factor") if key in base}
        return {**content, "rope_parameters": {**kept, **scaling}}
    return {**content, "rope_scaling": scaling}


def without_quantization(content):
    """config.json's content for weights that are written in a plain dtype."""
    content = {key: value for key, value in content.items() if key not in ("quantization_config", "compression_config")}
    return {key: without_quantization(value) if isinstance(value, dict) else value for key, value in content.items()}


def side_files(folder, config=None, rope_scaling=None):
    """Everything of a model folder but its weights, as {name: bytes}: config, tokenizer, templates, code. With `config`,
    config.json names the dtype the weights are written in, and the RoPE scaling they were trained with if that was replaced."""
    files = {}
    for path in sorted(Path(folder).iterdir()):
        keep = path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHTS)
        if keep and path.stat().st_size <= LARGEST_SIDE_FILE and path.name not in ("args.json", "logging.jsonl", "README.md"):
            files[path.name] = path.read_bytes()
    if config is not None and "config.json" in files:
        content = without_quantization(json.loads(files["config.json"]))
        for key in ("dtype", "torch_dtype"):
            if key in content:
                content[key] = str(config.params_dtype).removeprefix("torch.")
        if rope_scaling:
            content = with_rope_scaling(content, rope_scaling)
        files["config.json"] = (json.dumps(content, indent=2) + "\n").encode()
    return files


def tokenizer_files(folder):
    """The side files an adapter carries along."""
    names = ("token", "vocab", "merges", "special_tokens", "chat_template", "added_tokens")
    return {name: data for name, data in side_files(folder).items() if any(word in name for word in names)}


def peak_memory_gib():
    """Peak memory of this process: the GPU allocator's, or resident memory on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
