"""Megatron torch_dist checkpoints: layout, round trip, what others write, and that only data comes out of them."""

import json
import pickle
import shutil
import subprocess
import sys

import mcore_bridge as mb
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from mcore_bridge.megatron import convert as megatron_convert
from mcore_bridge.megatron import from_megatron, load_megatron, locate, to_megatron
from mcore_bridge.megatron.dcp import Chunk, write_chunks
from tiny import stored as tensors
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def config_of(folder, dtype="float32", **more):
    return mb.ModelConfig(**{**mb.hf_to_mcore_config(folder), "params_dtype": dtype, **more})


def everything(folder):
    """All tensors of a checkpoint by PyTorch's own loader."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


@pytest.mark.parametrize("family", ["llama3_biases_tied", "qwen2", "qwen3"])
def test_round_trip_is_bit_identical(tmp_path, family, monkeypatch):
    monkeypatch.setattr(megatron_convert, "_LARGEST_CHUNK", 10_000)  # the vocabulary in several shards
    tiny.save(family, tmp_path / "hf")
    config = config_of(tmp_path / "hf")
    seen = []
    to_megatron(config, tmp_path / "hf", tmp_path / "mcore", {"config.json": b"{}"}, lambda *x: seen.append(x))
    assert seen[-1][0] == seen[-1][1]
    assert (tmp_path / "mcore/latest_checkpointed_iteration.txt").read_text() == "1"
    assert locate(tmp_path / "mcore") == tmp_path / "mcore/iter_0000001"
    from_megatron(config, tmp_path / "mcore", tmp_path / "back", 50_000)
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1


def test_layout_is_megatrons(tmp_path):
    tiny.save("qwen3", tmp_path / "hf")
    to_megatron(config_of(tmp_path / "hf"), tmp_path / "hf", tmp_path / "mcore")
    folder = tmp_path / "mcore/iter_0000001"
    state, hf = everything(folder), tensors(tmp_path / "hf")
    layer = "model.layers.{}.".format
    # Layers stacked in front, gate over up, q k v per group, the vocabulary padded to 128.
    assert state["decoder.layers.mlp.linear_fc1.weight"].shape == (4, 192, 64)
    for index in range(4):
        fc1 = torch.cat([hf[layer(index) + "mlp.gate_proj.weight"], hf[layer(index) + "mlp.up_proj.weight"]])
        assert torch.equal(state["decoder.layers.mlp.linear_fc1.weight"][index], fc1)
        q, k, v = (hf[layer(index) + f"self_attn.{x}_proj.weight"].view(4, -1, 64) for x in "qkv")
        qkv = torch.cat([q, k, v], 1).view(-1, 64)
        assert torch.equal(state["decoder.layers.self_attention.linear_qkv.weight"][index], qkv)
        norm = state["decoder.layers.self_attention.linear_qkv.layer_norm_weight"][index]
        assert torch.equal(norm, hf[layer(index) + "input_layernorm.weight"])
    embedding = state["embedding.word_embeddings.weight"]
    assert embedding.shape == (128, 64) and torch.equal(embedding[:101], hf["model.embed_tokens.weight"])
    assert not embedding[101:].any() and state["output_layer.weight"].shape == (128, 64)
    chunks = FileSystemReader(folder).read_metadata().state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks
    assert [tuple(chunk.sizes) for chunk in chunks] == [(1, 64, 96)] * 4
    assert json.loads((folder / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    common = torch.load(folder / "common.pt", weights_only=False)
    assert common["iteration"] == 1 and common["args"].num_layers == 4 and common["args"].padded_vocab_size == 128
    assert json.loads((tmp_path / "mcore/args.json").read_text())["hidden_size"] == 64


def elsewhere(tmp_path, numbered, halves, splits):
    """The checkpoint as other settings write it: layers under their numbers, fc1 in two keys, several ranks, another
    padding, a prefix, optimizer states."""
    state = everything(tmp_path / "mcore/iter_0000001")
    written = {}
    for key, value in state.items():
        if not key.startswith("decoder.layers."):
            if "embedding" in key or "output" in key:
                value = torch.cat([value, torch.zeros(64, *value.shape[1:])])
            written[f"model.{key}"] = value
        elif numbered:
            for index, layer in enumerate(value):
                name = "model." + key.replace("decoder.layers.", f"decoder.layers.{index}.")
                if halves and "linear_fc1.weight" in key:
                    written[f"{name}_w"], written[f"{name}_v"] = layer.chunk(2)
                else:
                    written[name] = layer
        else:
            written[f"model.{key}"] = value
    written["optimizer.state.exp_avg"] = torch.zeros(7)
    chunks = []
    for key, value in written.items():
        dim = 0 if numbered or "layers" not in key else 1
        for part in range(splits):
            size = -(-value.shape[dim] // splits)
            first = min(part * size, value.shape[dim])
            count = min(size, value.shape[dim] - first)
            if count:
                offsets = [0] * value.dim()
                offsets[dim] = first
                piece = value.narrow(dim, first, count)
                chunks.append(Chunk(key, value.shape, offsets, piece.shape, value.dtype, lambda piece=piece: piece))
    target = tmp_path / f"other-{numbered}-{halves}-{splits}/release"
    target.mkdir(parents=True)
    write_chunks(target, chunks)
    (target.parent / "latest_checkpointed_iteration.txt").write_text("release\n")
    return target.parent


@pytest.mark.parametrize("numbered,halves,splits", [(True, True, 1), (True, False, 3), (False, False, 4)])
def test_checkpoints_of_other_settings_are_read(tmp_path, numbered, halves, splits):
    tiny.save("qwen3", tmp_path / "hf")
    config = config_of(tmp_path / "hf")
    to_megatron(config, tmp_path / "hf", tmp_path / "mcore")
    other = elsewhere(tmp_path, numbered, halves, splits)
    from_megatron(config, other, tmp_path / "back", 10**9)
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_engine_loads_it(tmp_path):
    model = tiny.save("qwen2", tmp_path / "hf")
    config = config_of(tmp_path / "hf")
    to_megatron(config, tmp_path / "hf", tmp_path / "mcore")
    models = mb.get_mcore_model(config, device="cpu")
    load_megatron(models, tmp_path / "mcore")
    ids, _ = tiny.rows(1, 16)
    with torch.no_grad():
        assert tiny.relative(mb.forward_logits(models, ids), model(ids).logits) < 2e-5


def test_quantised_and_cast_sources(tmp_path):
    tiny.save("qwen3", tmp_path / "hf")
    mb.convert_checkpoint(
        tmp_path / "hf", tmp_path / "fp8", quantize="fp8", extra_files={"config.json": (tmp_path / "hf/config.json").read_bytes()}
    )
    mb.convert_checkpoint(tmp_path / "fp8", tmp_path / "plain", dequantize=True, torch_dtype="bfloat16")
    to_megatron(config_of(tmp_path / "fp8", "bfloat16"), tmp_path / "fp8", tmp_path / "mcore")
    from_megatron(config_of(tmp_path / "hf", "bfloat16"), tmp_path / "mcore", tmp_path / "back", 10**9)
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_errors_name_the_cause(tmp_path):
    tiny.save("qwen3", tmp_path / "hf")
    config = config_of(tmp_path / "hf")
    to_megatron(config, tmp_path / "hf", tmp_path / "mcore")
    with pytest.raises(ValueError, match="exists already"):
        to_megatron(config, tmp_path / "hf", tmp_path / "mcore")
    with pytest.raises(FileNotFoundError, match="no Megatron torch_dist checkpoint"):
        from_megatron(config, tmp_path / "hf", tmp_path / "out", 10**9)
    with pytest.raises(ValueError, match="needs"):
        from_megatron(config_of(tmp_path / "hf", hidden_size=32), tmp_path / "mcore", tmp_path / "out", 10**9)
    with pytest.raises(KeyError, match="q_proj.bias|linear_qkv.bias"):
        from_megatron(config_of(tmp_path / "hf", add_qkv_bias=True), tmp_path / "mcore", tmp_path / "out", 10**9)
    with pytest.raises(KeyError, match="missing"):
        to_megatron(config_of(tmp_path / "hf", num_layers=5), tmp_path / "hf", tmp_path / "new")
    shutil.rmtree(tmp_path / "mcore/iter_0000001")
    with pytest.raises(FileNotFoundError, match="iter_0000001"):
        locate(tmp_path / "mcore")
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_metadata_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("boo",))

    (tmp_path / "iter").mkdir()
    (tmp_path / "iter/.metadata").write_bytes(pickle.dumps(Evil()))
    tiny.save("qwen3", tmp_path / "hf")
    with pytest.raises(ValueError, match="builtins.print"):
        from_megatron(config_of(tmp_path / "hf"), tmp_path / "iter", tmp_path / "out", 10**9)


def test_a_failed_conversion_leaves_nothing(tmp_path):
    tiny.save("qwen3", tmp_path / "hf")

    def stop(done, total):
        raise RuntimeError("enough")

    with pytest.raises(Exception, match="enough"):
        to_megatron(config_of(tmp_path / "hf"), tmp_path / "hf", tmp_path / "mcore", progress=stop)
    assert not (tmp_path / "mcore").exists() and not list(tmp_path.glob(".*"))


def test_commands(tmp_path):
    tiny.save("qwen3", tmp_path / "hf")

    def run(*words):
        done = subprocess.run([sys.executable, "-m", "mcore_bridge", "export", *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "ok" in run("--model", tmp_path / "hf", "--to_mcore", "true", "--test_convert_precision", "true")
    target = tmp_path / "hf-mcore"
    assert "ok" in run("--mcore_model", target, "--to_hf", "true", "--test_convert_precision", "true")
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "hf-mcore-hf")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
