"""Hugging Face folders to Megatron `torch_dist` checkpoints and back, parameter by parameter."""

import argparse
import json
import os
import shutil
import threading
from pathlib import Path

import torch

from ..engine import _core
from .dcp import Chunk, SliceReader, write_chunks
from .layout import LATEST, candidates, locate, places

VOCABULARY_MULTIPLE = 128  # Megatron's make_vocab_size_divisible_by
_LARGEST_CHUNK = 256 << 20  # bytes of a shard that can be cut along the vocabulary


def _box(matrix, region):
    """The view of a parameter (as a matrix) that lines up with a region's rows in Hugging Face order."""
    columns = matrix.shape[1]
    rows, k = region["rows"], region["stretches"]
    first = region["row"] * columns + region["col"]
    if k == 1:
        return matrix.as_strided((rows, region["cols"]), (columns, 1), first)
    return matrix.as_strided((rows // k, k, region["cols"]), (columns, region["stretch"] * columns, 1), first)


def _hf_view(tensor, region, shape):
    offset, row, col = region["strides"]
    view = tensor.as_strided((region["rows"], region["cols"]), (row, col), offset)
    return view.reshape(shape) if len(shape) == 2 else view.unflatten(0, shape[:2])


def assemble(plan, tensors):
    """The parameter of a plan from its whole Hugging Face tensors."""
    result = torch.zeros(plan["sizes"], dtype=tensors[0].dtype)
    matrix = result.view(-1, 1) if result.dim() == 1 else result.flatten(0, -2)
    for region in plan["regions"]:
        target = _box(matrix, region)
        target.copy_(_hf_view(tensors[region["tensor"]].contiguous(), region, target.shape))
    return result


def disassemble(plan, parameter):
    """The inverse: the Hugging Face tensors of a plan."""
    parameter = parameter.contiguous()
    tensors = [torch.empty(shape, dtype=parameter.dtype) for _, shape in plan["tensors"]]
    matrix = parameter.view(-1, 1) if parameter.dim() == 1 else parameter.flatten(0, -2)
    for region in plan["regions"]:
        source = _box(matrix, region)
        _hf_view(tensors[region["tensor"]], region, source.shape).copy_(source)
    return tensors


def _padded(rows):
    return -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _dtype(plan, dtype):
    """What a plan's parameter is kept in when the model's others are kept in `dtype`."""
    return torch.float32 if plan["float32"] else dtype


def _chunks(plans, source, params_dtype):
    """Chunks of the whole model; only vocabularies are cut, everything else is one shard per parameter."""
    found = places(plans)
    for plan in plans:
        place, sizes, dtype = found[plan["name"]], list(plan["sizes"]), _dtype(plan, params_dtype)
        lead = len(place.axes)
        if not plan["pad_rows"]:
            yield Chunk(
                key=place.key,
                size=(*place.axes, *sizes),
                offsets=(*place.index, *[0] * len(sizes)),
                sizes=(*[1] * lead, *sizes),
                dtype=dtype,
                values=lambda plan=plan, sizes=tuple(sizes), lead=lead, dtype=dtype: assemble(
                    plan, [source.read(name, 0, shape[0], dtype) for name, shape in plan["tensors"]]
                ).view(*[1] * lead, *sizes),
            )
            continue
        (name, shape), inner = plan["tensors"][0], torch.Size(sizes[1:]).numel()
        whole = _padded(shape[0])
        step = max(1, _LARGEST_CHUNK // (inner * dtype.itemsize))
        for first in range(0, whole, step):
            count = min(step, whole - first)

            def values(name=name, first=first, count=count, shape=shape, dtype=dtype):
                rows = torch.zeros((count, *shape[1:]), dtype=dtype)
                filled = max(0, min(count, shape[0] - first))
                if filled:
                    rows[:filled] = source.read(name, first, filled, dtype)
                return rows

            yield Chunk(place.key, (whole, *sizes[1:]), (first, *[0] * (len(sizes) - 1)), (count, *sizes[1:]), dtype, values)


def _megatron_args(config):
    """The arguments Megatron compares when it loads, in its names, and what a reader of args.json needs."""
    fields = config.to_dict()
    names = [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "add_qkv_bias",
        "qk_layernorm",
        "untie_embeddings_and_output_weights",
        "rotary_base",
        "rotary_percent",
        "norm_epsilon",
        "hf_model_type",
        "mcore_model_type",
    ]
    args = {name: fields[name] for name in names if fields.get(name) is not None}
    args.update(
        padded_vocab_size=_padded(config.padded_vocab_size),
        vocab_size=config.padded_vocab_size,
        make_vocab_size_divisible_by=VOCABULARY_MULTIPLE,
        max_position_embeddings=fields.get("max_position_embeddings"),
        swiglu=True,
        normalization="RMSNorm",
        position_embedding_type="rope",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        params_dtype=str(config.params_dtype).removeprefix("torch."),
        ckpt_format="torch_dist",
    )
    return args


def to_megatron(config, hf_folder, output_dir, side_files=None, progress=lambda done, total: None, replace=False):
    """Writes `<output_dir>/iter_0000001` and what names it. `config`: the ModelConfig, whose params_dtype the weights take (quantised
    ones are dequantised). The folder appears whole or not at all; with `replace` it takes the place of an old one. side_files:
    {name: bytes} put at its root."""
    target = Path(os.path.abspath(output_dir))
    if target.exists() and not replace:
        raise ValueError(f"{output_dir}: exists already")
    staging = target.parent / f".{target.name}.saving"
    shutil.rmtree(staging, ignore_errors=True)
    source = _core.LogicalCheckpoint(os.fspath(hf_folder))
    plans = _core.parameter_plans(config.engine)
    _check_source(plans, source, hf_folder)
    chunks = list(_chunks(plans, source, config.params_dtype))
    total = sum(torch.Size(chunk.sizes).numel() * chunk.dtype.itemsize for chunk in chunks)
    if shutil.disk_usage(_existing_parent(target)).free < total:
        raise OSError(
            f"{output_dir}: {total / 1e9:.1f} GB are needed, {shutil.disk_usage(_existing_parent(target)).free / 1e9:.1f} are free"
        )
    done, lock = [0], threading.Lock()

    def wrote(count):
        with lock:
            done[0] += count
            progress(done[0], total)

    try:
        folder = staging / "iter_0000001"
        folder.mkdir(parents=True)
        write_chunks(folder, chunks, wrote=wrote)
        args = _megatron_args(config)
        torch.save({"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 1}, folder / "common.pt")
        (folder / "metadata.json").write_text(
            json.dumps(
                dict(sharded_backend="torch_dist", sharded_backend_version=1, common_backend="torch", common_backend_version=1)
            )
        )
        (staging / "args.json").write_text(json.dumps(args, indent=2) + "\n")
        for name, data in (side_files or {}).items():
            (staging / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        (staging / LATEST).write_text("1")
        for path in [*folder.iterdir(), *staging.iterdir(), staging]:
            _sync(path)
        old = target.parent / f".{target.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.rename(target, old)
        os.rename(staging, target)
        shutil.rmtree(old, ignore_errors=True)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return total


def _existing_parent(path):
    while not path.exists():
        path = path.parent
    return path


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_source(plans, source, folder):
    names = set(source.names())
    missing, wrong = [], []
    for plan in plans:
        for name, shape in plan["tensors"]:
            if name not in names:
                missing.append(name)
            elif list(source.shape(name)) != list(shape):
                wrong.append(f"{name} is {source.shape(name)}, the model needs {list(shape)}")
    if missing:
        raise KeyError(f"{folder}: {len(missing)} tensors are missing, e.g. {missing[:5]}")
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit, e.g. {wrong[:5]}")


class MegatronCheckpoint:
    """Parameters of a Megatron checkpoint by their plan, wherever it keeps them."""

    def __init__(self, folder, plans):
        self.folder = locate(folder)
        self.reader = SliceReader(self.folder)
        self.places = places(plans)
        keys = self.reader.tensors.keys()
        # Some trees put the model under a name.
        self.prefix = next(
            (p for p in ("", "model.", "module.", "model.module.") if any(k.startswith(p + "decoder.") for k in keys)), ""
        )

    def sources(self, plan):
        """[(key, leading index)] of a parameter. KeyError when the checkpoint has it nowhere."""
        for candidate in candidates(plan["name"], self.places[plan["name"]]):
            found = [(self.prefix + key, index) for key, index in candidate]
            if all(
                key in self.reader.tensors and len(self.reader.tensors[key].size) == len(index) + len(plan["sizes"])
                for key, index in found
            ):
                return found
        raise KeyError(f"{self.folder}: has no '{self.prefix}{self.places[plan['name']].key}' (parameter {plan['name']})")

    def read(self, plan, first=0, count=None):
        """The parameter of a plan (rows [first, first + count) of it), without vocabulary padding."""
        sizes = list(plan["sizes"])
        count = sizes[0] if count is None else count
        sources = self.sources(plan)
        parts = []
        for key, index in sources:
            extent = list(self.reader.tensors[key].size)[len(index) :]
            rows = count if len(sources) == 1 else sizes[0] // len(sources)
            if extent[1:] != sizes[1:] or (
                extent[0] < first + rows if plan["pad_rows"] else extent[0] * len(sources) != sizes[0]
            ):
                raise ValueError(f"{self.folder}: '{key}' is {extent}, the model's {plan['name']} needs {sizes}")
            inner = [0] * (len(sizes) - 1)
            box = self.reader.read(key, (*index, first, *inner), (*[1] * len(index), rows, *sizes[1:]))
            parts.append(box.view(rows, *sizes[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def from_megatron(config, folder, output_dir, max_shard_bytes, side_files=None, progress=lambda done, total: None):
    """Writes the Hugging Face folder of a Megatron checkpoint, in config.params_dtype; whole or not at all."""
    plans = _core.parameter_plans(config.engine)
    source = MegatronCheckpoint(folder, plans)
    for plan in plans:
        source.sources(plan)  # everything is looked up before anything is written
    stored = [(name, list(shape), _dtype(plan, config.params_dtype)) for plan in plans for name, shape in plan["tensors"]]
    total = sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in stored)
    writer = _core.FolderWriter(os.fspath(output_dir), stored, max_shard_bytes)
    try:
        done = 0
        for plan in plans:
            dtype = _dtype(plan, config.params_dtype)
            if plan["pad_rows"]:
                (name, shape), inner = plan["tensors"][0], torch.Size(plan["sizes"][1:]).numel()
                step = max(1, _LARGEST_CHUNK // (inner * dtype.itemsize))
                pieces = (
                    (name, first * inner, source.read(plan, first, min(step, shape[0] - first)))
                    for first in range(0, shape[0], step)
                )
            else:
                tensors = disassemble(plan, source.read(plan))
                pieces = ((name, 0, tensor) for (name, _), tensor in zip(plan["tensors"], tensors))
            for name, at, values in pieces:
                writer.write(name, at, values.to(dtype))
                done += values.numel() * dtype.itemsize
                progress(done, total)
        writer.commit(list((side_files or {}).items()))
    except BaseException:
        writer.abandon()
        raise
    return total


def load_megatron(models, folder):
    """Fills this rank's chunks from a Megatron checkpoint; every rank reads the layers it holds. Returns nothing; raises before
    anything is changed when a parameter is missing."""
    from ..model import unwrap_model
    from ..parallel_state import get_parallel_state

    models = unwrap_model(models if isinstance(models, list) else [models])
    config, state = models[0].config, get_parallel_state()
    whole = _core.parameter_plans(config.engine)
    source = MegatronCheckpoint(folder, whole)
    by_tensor = {name: plan for plan in whole for name, _ in plan["tensors"]}
    for plan in whole:
        source.sources(plan)
    for model in models:
        parameters = {name.replace("base_layer.", ""): tensor for name, tensor in model.engine.named_parameters()}
        plans = _core.parameter_plans(
            config.engine,
            layers=(model.engine.first_layer, model.engine.num_layers),
            pre_process=model.engine.pre_process,
            post_process=model.engine.post_process,
            tp_rank=state.tp_rank,
            tp_size=state.tp_size,
        )
        for plan in plans:
            tensors = {}
            for name, _ in plan["tensors"]:
                if name not in tensors:
                    origin = by_tensor[name]
                    (rows, *_rest) = origin["tensors"][0][1]
                    values = source.read(origin, 0, rows) if origin["pad_rows"] else source.read(origin)
                    pieces = [values] if origin["pad_rows"] else disassemble(origin, values)
                    tensors.update(zip((tensor for tensor, _ in origin["tensors"]), pieces))
            with torch.no_grad():
                values, parameter = assemble(plan, [tensors[name] for name, _ in plan["tensors"]]), parameters[plan["name"]]
                if parameter.dtype == torch.float8_e4m3fn:
                    model.engine.set_weight(plan["name"], values)
                else:
                    parameter.copy_(values)
