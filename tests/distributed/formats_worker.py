"""Loads a quantised checkpoint on each layout and saves it plain and quantised: `formats_worker.py FOLDER OUT`."""

import sys
from pathlib import Path

import mcore_bridge as mb
import torch
import torch.distributed as dist
from safetensors.torch import load_file


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def check_stream(config, models, folder):
    """Codes and scales come as the files have them; with only_master_rank to rank 0 alone."""
    saved = {}
    for file in Path(folder).glob("*.safetensors"):
        saved |= load_file(file)
    for only_master in (False, True):
        streamed = dict(
            config.bridge.export_weights(models, quantization="fp8", only_master_rank=only_master, bucket_size=20_000)
        )
        if only_master and dist.get_rank() > 0:
            assert not streamed
            continue
        assert streamed.keys() == saved.keys()
        for name, tensor in streamed.items():
            assert tensor.dtype == saved[name].dtype and tensor.shape == saved[name].shape, name
            assert torch.equal(bits(tensor), bits(saved[name])), name


def run(folder, out, tp, pp, dtype="float32"):
    mb.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    config = mb.ModelConfig(
        **{
            **mb.hf_to_mcore_config(folder),
            "params_dtype": dtype,
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
        }
    )
    models = mb.get_mcore_model(config, device="cpu")
    report = config.bridge.load_weights(models, folder)
    assert report["bytes_read"] == report["bytes_needed"] and not report["unexpected"], report
    name = f"tp{tp}_pp{pp}" + ("" if dtype == "float32" else f"-{dtype}")
    files = {"config.json": (Path(folder) / "config.json").read_bytes()} if dist.get_rank() == 0 else {}
    config.bridge.save_weights(models, Path(out) / f"{name}-plain")
    config.bridge.save_weights(models, Path(out) / f"{name}-fp8", quantization="fp8", extra_files=files)
    check_stream(config, models, Path(out) / f"{name}-fp8")
    for parameter_name, parameter in models[0].named_parameters():
        if dist.get_rank() == 0 and parameter_name == "decoder.layers.0.mlp.linear_fc2.weight":
            parameter.data[0, 0] = 9.0
    config.bridge.save_weights(models, Path(out) / f"{name}-changed", quantization="fp8")
    changed = dist.get_rank() < tp * pp  # the copy of the model that is written
    if changed:
        check_stream(config, models, Path(out) / f"{name}-changed")
    # A number that cannot be quantised fails on every rank.
    for parameter in models[-1].parameters():
        if dist.get_rank() == tp * pp - 1 and parameter.dim() == 2:
            parameter.data[0, 0] = float("nan")
    attempts = [lambda: config.bridge.save_weights(models, Path(out) / f"{name}-nan", quantization="fp8")]
    if changed:
        attempts.append(lambda: list(config.bridge.export_weights(models, quantization="fp8")))
    for attempt in attempts:
        try:
            attempt()
        except FloatingPointError as error:
            assert "NaN" in str(error)
        else:
            raise AssertionError("NaN was quantised")
    mb.destroy_model_parallel()


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for tp, pp in ((4, 1), (2, 2), (1, 4), (2, 1)):
        run(sys.argv[1], sys.argv[2], tp, pp)
    run(sys.argv[1], sys.argv[2], 2, 1, "bfloat16")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
