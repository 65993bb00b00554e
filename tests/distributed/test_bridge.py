"""Weights in and out on several ranks: bytes read, streams, converters, crashes, full disks."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from launch import HERE, environment, launch
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    work = tmp_path_factory.mktemp("bridge")
    tiny.save("qwen3", work / "model")
    base = tiny.stored(work / "model")
    changed = {"old." + name: tensor for name, tensor in base.items()}
    query = "old.model.layers.0.self_attn.q_proj.weight"
    changed[query] = changed[query].t().contiguous()
    changed["junk.counter"] = torch.arange(3)
    (work / "converted_in").mkdir()
    save_file(changed, work / "converted_in" / "model.safetensors")
    finished = launch([HERE / "bridge_worker.py", work / "model", work], 4)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    assert "Loading" in finished.stderr and "Saving" in finished.stderr, "progress bars"
    return torch.load(work / "results.pt", weights_only=True), base, work


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def test_every_byte_is_read_once(results):
    found, base, _ = results
    assert all(read == needed for read, needed in found["bytes"])
    # Matrices are read once in all, replicated vectors once per tensor-parallel rank.
    matrices = sum(t.nbytes for t in base.values() if t.dim() == 2)
    vectors = sum(t.nbytes for t in base.values() if t.dim() == 1)
    assert sum(read for read, _ in found["bytes"]) == matrices + 2 * vectors


def test_streams(results):
    found, base, _ = results
    same(found["export"], base)
    same(found["export_master"], base)


def test_stream_feeds_a_transformers_model(results):
    from transformers import AutoModelForCausalLM

    found, _, work = results
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(found["export_master"])
    with torch.no_grad():
        expected = model(tiny.rows(2, 16, seed=1)[0]).logits
    assert tiny.relative(found["logits"], expected) < 1e-4


def test_converters(results):
    found, base, work = results
    same(found["converted_load"], base)
    expected = {"new." + name: tensor for name, tensor in base.items() if name != "model.norm.weight"}
    up = "new.model.layers.1.mlp.up_proj.weight"
    expected[up] = expected[up].t().double().contiguous()
    same(tiny.stored(work / "converted_out"), expected)


def test_shards_in_any_unit(results):
    _, base, work = results
    same(tiny.stored(work / "plain_out"), base)
    assert len(list((work / "plain_out").glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_saves_leave_one_whole_state(tmp_path, kills):
    tiny.save("qwen3", tmp_path / "model", hidden_size=128, intermediate_size=512)
    (tmp_path / "work").mkdir()
    finished = launch([HERE / "kill_harness.py", tmp_path / "model", tmp_path / "work", kills, kills], 1, timeout=1000)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert "always one whole state" in finished.stdout


FULL_DISK = """
import sys
from pathlib import Path
import torch
import mcore_bridge as mb
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
mb.initialize_model_parallel()
config = mb.ModelConfig(**mb.hf_to_mcore_config(folder))
models = mb.get_mcore_model(config)
config.bridge.load_weights(models, folder)
config.bridge.save_weights(models, out)
for parameter in models[0].parameters():
    parameter.data.zero_()
try:
    config.bridge.save_weights(models, out)
except OSError as error:
    print("ERROR", error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which takes root")
def test_a_full_disk_keeps_the_old_state(tmp_path):
    tiny.save("qwen3", tmp_path / "model")
    base = tiny.stored(tmp_path / "model")
    size = sum(tensor.nbytes for tensor in base.values())
    (tmp_path / "disk").mkdir()
    (tmp_path / "script.py").write_text(FULL_DISK)
    mount = f"mount -t tmpfs -o size={int(size * 1.5)} none {tmp_path}/disk"
    save = f"{sys.executable} {tmp_path}/script.py {tmp_path}/model {tmp_path}/disk/out"
    look = f"ls -A {tmp_path}/disk && cp -r {tmp_path}/disk/out {tmp_path}/kept"
    finished = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {save} && {look}"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "unshare failed" in finished.stderr or "mount:" in finished.stderr:
        pytest.skip(f"no mounts here: {finished.stderr[-200:]}")
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = finished.stdout.split("\n")
    assert any(line.startswith("ERROR") and "model.safetensors" in line and "No space" in line for line in lines), lines
    assert [line for line in lines if line and not line.startswith("ERROR")] == ["out"], "nothing is left beside it"
    same(tiny.stored(tmp_path / "kept"), base)


def test_memory_beyond_the_parameters_stays_small(tmp_path):
    """A child loads 180 MB of bfloat16 into float32 parameters and saves them; beside the parameters it holds buffers."""
    shape = dict(vocab_size=32000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=2)
    tiny.build("qwen3", **shape).bfloat16().save_pretrained(tmp_path / "model")
    script = f"""
import resource
import mcore_bridge as mb, torch
torch.set_num_threads(1)
mb.initialize_model_parallel()
config = mb.ModelConfig(**{{**mb.hf_to_mcore_config({str(tmp_path / "model")!r}), "params_dtype": torch.float32}})
models = mb.get_mcore_model(config)
for parameter in models[0].parameters():
    parameter.data.zero_()
size = sum(parameter.nbytes for parameter in models[0].parameters())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config.bridge.load_weights(models, {str(tmp_path / "model")!r})
config.bridge.save_weights(models, {str(tmp_path / "out")!r}, max_shard_size="100MB")
print(size >> 20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    size, more = map(int, done.stdout.split())
    assert size > 300 and more < 64, f"{more} MiB for parameters of {size} MiB"
    same(tiny.stored(tmp_path / "out"), {name: tensor.float() for name, tensor in tiny.stored(tmp_path / "model").items()})
