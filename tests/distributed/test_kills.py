"""kill -9 at random moments, also inside a save: the weights at the end are those of a run nobody disturbed."""

import json

import chat_model
import pytest
import torch
from launch import HERE, launch
from safetensors.torch import load_file

ARGUMENTS = (
    "--torch_dtype bfloat16 --train_iters {steps} --global_batch_size 4 --max_length 32 --lr 1e-2 --add_version false --save_steps 1 "
    "--save_total_limit 3 --report_to none --tensor_model_parallel_size 2 --packing true --packing_length 24 --max_shard_size 60KB"
)


def everything(folder):
    return {
        f"{path.parent.name}/{path.name}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def survive(tmp_path, kills, steps, seed):
    work = chat_model.make(tmp_path, num_hidden_layers=1)
    argv = ["sft", "--model", work / "model", "--dataset", work / "chat.jsonl", *ARGUMENTS.format(steps=steps).split()]
    finished = launch([HERE / "kill_worker.py", seed, kills, 2, work, *argv], 1, timeout=3000)
    said = "".join(path.read_text()[-3000:] for path in sorted(work.glob("log-*")))
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-3000:] + said
    print(finished.stdout)
    expected = everything(work / "whole" / f"checkpoint-{steps}")
    assert len(expected) > 20
    for killed in (work / "sync", work / "async"):
        found = everything(killed / f"checkpoint-{steps}")
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key
        assert not [path.name for path in killed.iterdir() if path.name.startswith(".")], "leftovers"
        lines = (killed / "logging.jsonl").read_text().splitlines()
        steps_logged = [json.loads(line)["iteration"] for line in lines if "loss" in line and "iteration" in line]
        assert steps_logged == sorted(set(steps_logged))


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="forks its ranks")
def test_three_kills(tmp_path):
    survive(tmp_path, 3, 8, seed=1)


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    survive(tmp_path, 50, 80, seed=2)
