"""Errors reach every rank together: the same cause on screen, an exit code, no hang, nothing half-written."""

import json
import re
import struct
import time

import pytest
import tiny
from launch import HERE, launch
from safetensors.torch import load_file


@pytest.fixture
def folder(tmp_path):
    tiny.save("qwen3", tmp_path / "model")
    return tmp_path / "model"


def fails(scenario, folder, work, error, *texts):
    start = time.monotonic()
    finished = launch([HERE / "failing_worker.py", scenario, folder, work], 2, timeout=120)
    assert finished.returncode != 0 and time.monotonic() - start < 100
    lines = re.findall(r"RANK (\d) (.*)", finished.stdout)
    assert sorted(rank for rank, _ in lines) == ["0", "1"], finished.stdout + finished.stderr[-3000:]
    for _, line in lines:
        assert line.startswith(error), line
        for text in texts:
            assert text in line, line


def last_shard(folder):
    """The shard that holds the final norm, which only the last pipeline stage reads, and its path."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"]["model.norm.weight"]


def test_missing_tensor(folder, tmp_path):
    from safetensors.torch import save_file

    shard = last_shard(folder)
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    del index["weight_map"]["model.norm.weight"]
    index_path.write_text(json.dumps(index))
    fails("load", folder, tmp_path, "KeyError", "model.norm.weight")


def test_mis_shaped_tensor(folder, tmp_path):
    from safetensors.torch import save_file

    shard = last_shard(folder)
    tensors = load_file(shard)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    save_file(tensors, shard)
    fails("load", folder, tmp_path, "ValueError", "model.norm.weight", "63", "64")


def test_wrong_dtype(folder, tmp_path):
    import torch
    from safetensors.torch import save_file

    shard = last_shard(folder)
    tensors = load_file(shard)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, shard)
    fails("load", folder, tmp_path, "ValueError", "model.norm.weight", "I8")


def test_truncated_shard(folder, tmp_path):
    shard = last_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])
    fails("load", folder, tmp_path, "ValueError", shard.name)


def test_missing_shard(folder, tmp_path):
    last_shard(folder).unlink()
    fails("load", folder, tmp_path, "FileNotFoundError", "model-")


def test_over_long_header(folder, tmp_path):
    shard = last_shard(folder)
    shard.write_bytes(struct.pack("<Q", 1 << 60) + shard.read_bytes()[8:])
    fails("load", folder, tmp_path, "ValueError", shard.name)


def test_layout_larger_than_the_world(folder, tmp_path):
    fails("layout", folder, tmp_path, "ValueError", "2")


def test_heads_do_not_divide(folder, tmp_path):
    fails("heads", folder, tmp_path, "ValueError", "tensor_model_parallel_size", "9")


def test_nan_names_the_step(folder, tmp_path):
    fails("nan_on_one_rank", folder, tmp_path, "FloatingPointError", "2")


def test_unequal_micro_batches(folder, tmp_path):
    fails("no_labels_on_one_rank", folder, tmp_path, "ValueError", "micro")


def test_full_disk_keeps_the_old_state(folder, tmp_path):
    fails("full_disk", folder, tmp_path, "OSError", "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert any(tensor.abs().sum() > 0 for tensor in saved.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_target_is_not_a_folder(folder, tmp_path):
    fails("not_a_folder", folder, tmp_path, "OSError", "file")


def ends(scenario, folder, seconds):
    tiny.save("qwen3", folder, num_attention_heads=6, num_key_value_heads=3, intermediate_size=96)
    start = time.monotonic()
    finished = launch([HERE / "hang_worker.py", scenario, folder], 3, timeout=120)
    assert finished.returncode != 0 and time.monotonic() - start < seconds
    return [line for line in finished.stderr.splitlines() if "mcore-bridge:" in line], finished.stderr


def test_the_rank_that_throws_speaks_alone(tmp_path):
    said, everything = ends("throw", tmp_path / "three", 60)
    assert said == ["mcore-bridge: rank 1: error: something only rank 1 sees"], everything


def test_a_hang_names_the_operation_and_who_is_missing(tmp_path):
    said, everything = ends("hang", tmp_path / "three", 90)
    assert len(said) == 1 and "all_reduce of [" in said[0] and "in group " in said[0] and "(ranks 0, 1, 2)" in said[0], everything
    assert "rank 1 never came: its last was all_gather (number" in everything
    assert "rank 2 never came" not in everything and "rank 0 never came" not in everything
