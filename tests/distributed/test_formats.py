"""Quantised checkpoints on split models: every layout loads the same values and saves the same bytes."""

import json

import mcore_bridge as mb
import tiny
import torch
from launch import HERE, launch
from safetensors.torch import load_file


def tensors(folder):
    result = {}
    for file in sorted(folder.glob("*.safetensors")):
        result.update(load_file(file))
    return result


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def test_every_layout_reads_and_writes_the_same(tmp_path):
    # Heads of 12 and an intermediate size of 264: no split falls on a block's edge, and blocks are ragged.
    tiny.save("qwen3", tmp_path / "plain", intermediate_size=264, hidden_size=136)
    config = {"config.json": (tmp_path / "plain/config.json").read_bytes()}
    mb.convert_checkpoint(tmp_path / "plain", tmp_path / "fp8", quantize="fp8", extra_files=config)
    config = {"config.json": (tmp_path / "fp8/config.json").read_bytes()}
    mb.convert_checkpoint(tmp_path / "fp8", tmp_path / "values", dequantize=True, torch_dtype="float32", extra_files=config)
    config = {"config.json": (tmp_path / "values/config.json").read_bytes()}
    mb.convert_checkpoint(tmp_path / "values", tmp_path / "again", quantize="fp8", extra_files=config)
    done = launch([HERE / "formats_worker.py", tmp_path / "fp8", tmp_path], 4)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    values, again = tensors(tmp_path / "values"), tensors(tmp_path / "again")
    assert any(name.endswith("_scale_inv") for name in again)
    for layout in ("tp4_pp1", "tp2_pp2", "tp1_pp4", "tp2_pp1"):
        plain, quantised = tensors(tmp_path / f"{layout}-plain"), tensors(tmp_path / f"{layout}-fp8")
        assert plain.keys() == values.keys() and quantised.keys() == again.keys()
        assert all(torch.equal(bits(plain[name]), bits(values[name])) for name in values), layout
        assert all(torch.equal(bits(quantised[name]), bits(again[name])) for name in again), layout
        written = json.loads((tmp_path / f"{layout}-fp8/config.json").read_text())["quantization_config"]
        expected = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
        assert sorted(written.pop("modules_to_not_convert")) == sorted(expected.pop("modules_to_not_convert"))
        assert written == expected
        assert not (tmp_path / f"{layout}-nan").exists()
