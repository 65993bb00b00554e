"""Weights between Hugging Face / PEFT files and the engine."""

import json
import os
import re
import warnings

from .converter import conversion, saved_tensor
from .engine import _core
from .model import engines
from .progress import Progress
from .utils import get_logger, is_master

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(size):
    """Bytes of "5GB", "500 MiB" or an int: bytes, as Transformers takes it, or a count of GB, as the original does, when it is
    below 10,000."""
    if isinstance(size, int) and not isinstance(size, bool):
        if size <= 0:
            raise ValueError(f"max_shard_size: {size} is not positive")
        return size if size >= 10_000 else size * 10**9
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"max_shard_size: '{size}' is not a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


class GPTBridge:
    """Obtained as `config.bridge`."""

    def __init__(self, config):
        self.config = config

    def load_weights(
        self,
        mg_models,
        hf_model_dir,
        peft_format=False,
        adapter_name="default",
        converter=None,
        strict=True,
        disable_tqdm=None,
    ):
        """Copies this rank's slices of the safetensors in `hf_model_dir` into the parameters; nothing else is read.

        hf_model_dir: a folder (with an index or one file) or a safetensors file. peft_format: read
        adapter_model.safetensors into the adapter `adapter_name`. converter: f(name, value) -> (name, value) or None to drop,
        with `value.load()` where the converter needs the numbers; names are those in the files. strict=False: what is missing
        keeps its value. disable_tqdm: None shows a progress bar on rank 0 for 2 GB and more.
        Raises KeyError (something is missing) or ValueError (something does not fit, or belongs to a layer without such a
        part), listing every such tensor, on all ranks together. Returns a dict of bytes_read, bytes_needed, missing, unexpected.
        """
        with Progress("Loading", disable_tqdm) as progress:
            bytes_read, bytes_needed, missing, unexpected = _core.load_weights(
                engines(mg_models),
                os.fspath(hf_model_dir),
                peft_format=peft_format,
                adapter_name=adapter_name,
                strict=strict,
                convert=None if converter is None else lambda reader: conversion(converter, reader),
                progress=progress,
            )
        if unexpected:
            get_logger().warning(f"{hf_model_dir}: {len(unexpected)} tensors have no place in the model, e.g. {unexpected[:3]}")
        return dict(bytes_read=bytes_read, bytes_needed=bytes_needed, missing=missing, unexpected=unexpected)

    def export_weights(
        self,
        mg_models,
        target_device=None,
        only_master_rank=False,
        peft_format=False,
        adapter_name="default",
        converter=None,
        tqdm_desc="Exporting: ",
        disable_tqdm=True,
        merge_lora=False,
        bucket_size=128 << 20,
        quantization=None,
    ):
        """Generator of (Hugging Face name, whole tensor), names and shapes as `save_weights` writes them and as inference
        engines load them. Collective: every rank iterates to the end.

        Tensors come in buckets of `bucket_size` bytes; the next bucket is on its way while the current one is used.
        only_master_rank: the other ranks send what they own, yield nothing and hold no whole tensor. target_device: where
        tensors are moved to (None: they stay). converter: f(name, tensor) -> (name, tensor), or None to drop.
        quantization="fp8": linear weights come as float8_e4m3fn codes, each followed by its `_scale_inv`, as `save_weights` writes
        them.
        """
        exporter = _core.WeightExporter(
            engines(mg_models),
            peft_format=peft_format,
            adapter_name=adapter_name,
            merge_lora=merge_lora,
            only_master=only_master_rank,
            bucket_bytes=int(bucket_size),
            quantization=quantization or "",
        )
        bar = None
        if not disable_tqdm and is_master():
            from tqdm import tqdm

            bar = tqdm(total=len(exporter), desc=tqdm_desc)
        while (item := exporter.next()) is not None:
            name, tensor = item
            if target_device is not None:
                tensor = tensor.to(target_device)
            item = (name, tensor) if converter is None else converter(name, tensor)
            if bar is not None:
                bar.update()
            if item is not None:
                yield item
        if bar is not None:
            bar.close()

    def save_weights(
        self,
        mg_models,
        output_dir,
        peft_format=False,
        adapter_name="default",
        converter=None,
        max_shard_size="5GB",
        merge_lora=False,
        extra_files=None,
        quantization=None,
        disable_tqdm=None,
    ):
        """Writes model*.safetensors (+ index), or adapter_model.safetensors with peft_format. Collective; every rank writes
        its own part. The folder appears whole or stays as it was. extra_files: {name: bytes} written in the same step.
        max_shard_size: "5GB", "500MB", "2GiB", "50KB" or a number of bytes (below 10,000: of GB, as the original counts).
        converter: f(name, tensor) -> (name, tensor), or None to drop; it is first asked with a tensor without data (device
        "meta"), since sizes are known before data. disable_tqdm: None shows a progress bar on rank 0 for 2 GB and more.
        quantization="fp8": linear weights in blocks of 128 x 128 with scales; a config.json among extra_files, or in the folder
        already, is given the matching quantization_config."""
        extra_files = dict(extra_files or {})
        config = os.path.join(output_dir, "config.json")
        if quantization and "config.json" not in extra_files and os.path.exists(config):
            with open(config, "rb") as file:
                extra_files["config.json"] = file.read()
        with Progress("Saving", disable_tqdm) as progress:
            _core.save_weights(
                engines(mg_models),
                os.fspath(output_dir),
                peft_format=peft_format,
                adapter_name=adapter_name,
                merge_lora=merge_lora,
                max_shard_bytes=parse_size(max_shard_size),
                extra_files=list(extra_files.items()),
                convert=None if converter is None else saved_tensor(converter),
                quantization=quantization or "",
                progress=progress,
            )

    def initialize(self, mg_models, seed=42):
        """Random weights that depend on the seed and the tensors' names only, so every layout starts alike."""
        _core.initialize(engines(mg_models), seed)

    def peft_adapter_config(self, mg_models, adapter_name="default", base_model_name_or_path=""):
        """The content of adapter_config.json. Collective. Warns when PEFT opens the adapter only with Transformers 4."""
        content, experts_share_names = _core.peft_adapter_config(engines(mg_models), adapter_name, base_model_name_or_path or "")
        if experts_share_names and is_master():
            warnings.warn(
                "the adapter covers experts and other layers of the same names (gate_proj, up_proj, down_proj): PEFT opens it with "
                "Transformers 4, where every expert is a module; with Transformers 5 merge it (mcore-bridge export --merge_lora "
                "true) or train without one of them (--target_modules q_proj k_proj v_proj o_proj, or --target_regex)",
                UserWarning,
                stacklevel=2,
            )
        return json.loads(content)


def inspect_checkpoint(path):
    """format, files, tensors (name, dtype, shape, bytes, file) and total_bytes of a checkpoint, without reading its data."""
    return json.loads(_core.inspect_checkpoint(os.fspath(path)))


def convert_checkpoint(
    model,
    output_dir,
    *,
    torch_dtype=None,
    dequantize=False,
    quantize=None,
    adapter=None,
    max_shard_size="5GB",
    extra_files=None,
    progress=None,
):
    """A new checkpoint from an old one without building the model: any model type, memory use independent of its size.

    torch_dtype: of the plain weights ("float32", "bfloat16", "float16"); quantize: "fp8" (blocks of 128 x 128) or "mxfp4" (stacked
    experts); dequantize: quantised weights become plain ones first; adapter: a PEFT LoRA folder to merge. What nothing changes is
    copied byte for byte. extra_files: {name: bytes} beside the weights; config.json among them is adapted. progress(done, total) in
    bytes. Returns a dict of bytes_read, bytes_written, tensors, copied, files. The folder appears whole or stays as it was.
    """
    return _core.convert_checkpoint(
        os.fspath(model),
        os.fspath(output_dir),
        dtype=str(torch_dtype or "").removeprefix("torch."),
        dequantize=dequantize,
        quantize=quantize or "",
        adapter=os.fspath(adapter) if adapter else "",
        max_shard_bytes=parse_size(max_shard_size),
        extra_files=list((extra_files or {}).items()),
        progress=progress,
    )


def diff_checkpoints(a, b, *, dequantize=False, progress=None):
    """Two checkpoints compared tensor by tensor: a dict of tensors (name, shape, dtype_a, dtype_b, identical, max_abs, relative),
    missing, extra and wrong_shape. max_abs and relative are None where NaN or Inf meets something else."""
    return json.loads(_core.diff_checkpoints(os.fspath(a), os.fspath(b), dequantize=dequantize, progress=progress))
