"""Quantised checkpoints on split models: every layout loads the same values and saves the same bytes."""

import json

import mcore_bridge as mb
import tiny
import torch
from launch import HERE, launch
from safetensors.torch import load_file, save_file
from tiny import stored as tensors

CHANGED = "model.layers.0.mlp.down_proj.weight"


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def test_every_layout_reads_and_writes_the_same(tmp_path):
    # Heads of 12 and an intermediate size of 264: no split falls on a block's edge, and blocks are ragged.
    tiny.save("qwen3", tmp_path / "plain", intermediate_size=264, hidden_size=136)
    config = {"config.json": (tmp_path / "plain/config.json").read_bytes()}
    mb.convert_checkpoint(tmp_path / "plain", tmp_path / "fp8", quantize="fp8", extra_files=config)
    # Scales as nothing here would choose them.
    torch.manual_seed(0)
    for file in (tmp_path / "fp8").glob("*.safetensors"):
        content = load_file(file)
        for name, tensor in content.items():
            if name.endswith("_scale_inv"):
                content[name] = tensor * (0.5 + torch.rand_like(tensor))
        save_file(content, file, {"format": "pt"})
    config = {"config.json": (tmp_path / "fp8/config.json").read_bytes()}
    mb.convert_checkpoint(tmp_path / "fp8", tmp_path / "values", dequantize=True, torch_dtype="float32", extra_files=config)
    done = launch([HERE / "formats_worker.py", tmp_path / "fp8", tmp_path], 4)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    values, loaded = tensors(tmp_path / "values"), tensors(tmp_path / "fp8")
    assert any(name.endswith("_scale_inv") for name in loaded)
    for layout in ("tp4_pp1", "tp2_pp2", "tp1_pp4", "tp2_pp1"):
        plain, quantised = tensors(tmp_path / f"{layout}-plain"), tensors(tmp_path / f"{layout}-fp8")
        assert plain.keys() == values.keys() and quantised.keys() == loaded.keys()
        assert all(torch.equal(bits(plain[name]), bits(values[name])) for name in values), layout
        assert all(torch.equal(bits(quantised[name]), bits(loaded[name])) for name in loaded), layout
        written = json.loads((tmp_path / f"{layout}-fp8/config.json").read_text())["quantization_config"]
        expected = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
        assert sorted(written.pop("modules_to_not_convert")) == sorted(expected.pop("modules_to_not_convert"))
        assert written == expected
        assert not (tmp_path / f"{layout}-nan").exists()
        # One weight changed: its block has a scale of its own, every other block is still what was loaded.
        changed = tensors(tmp_path / f"{layout}-changed")
        differ = {name for name in loaded if not torch.equal(bits(changed[name]), bits(loaded[name]))}
        assert differ == {CHANGED, CHANGED + "_scale_inv"}
        scale, before = changed[CHANGED + "_scale_inv"], loaded[CHANGED + "_scale_inv"]
        assert torch.equal(scale.flatten()[1:], before.flatten()[1:])
        torch.testing.assert_close(scale[0, 0], torch.tensor(9.0 / 448))
        same = bits(changed[CHANGED]) == bits(loaded[CHANGED])
        assert same[128:].all() and same[:, 128:].all() and changed[CHANGED][0, 0].float() == 448
    bfloat16 = tensors(tmp_path / "tp2_pp1-bfloat16-fp8")
    assert all(torch.equal(bits(bfloat16[name]), bits(loaded[name])) for name in loaded if loaded[name].element_size() == 1)
    assert all(torch.equal(bits(bfloat16[name]), bits(loaded[name])) for name in loaded if name.endswith("_scale_inv"))
