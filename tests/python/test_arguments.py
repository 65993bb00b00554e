"""Flags, files of flags, launching."""

import dataclasses
import json

import pytest
from mcore_bridge.cli.arguments import ExportArguments, TrainArguments, VerifyArguments, parse, parser
from mcore_bridge.cli.launch import torchrun_command
from mcore_bridge.cli.main import main
from mcore_bridge.cli.original_flags import NEUTRAL
from mcore_bridge.cli.train import _derived


def sft(*words):
    return parse(TrainArguments, "sft", words)


def test_types():
    found = sft(
        "--model", "m", "--dataset", "a.jsonl", "b.jsonl#5", "--packing", "true", "--lr", "1e-3", "--columns", '{"a": "b"}', "--train_iters", "7"
    )  # fmt: skip
    assert found.dataset == ["a.jsonl", "b.jsonl#5"] and found.packing is True and found.lr == 1e-3
    assert found.columns == {"a": "b"} and found.train_iters == 7 and found.lora_rank == 8


def test_file_of_flags(tmp_path, monkeypatch):
    monkeypatch.delenv("MCB_A", raising=False)
    monkeypatch.setenv("MCB_B", "kept")
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndataset: [x, y]\npacking: true\nlr: 1.0e-4\ncolumns: {a: b}\nENV: {MCB_A: 1, MCB_B: new}\n")
    found = sft(str(path), "--lr", "2e-4")
    assert found.dataset == ["x", "y"] and found.packing and found.lr == 2e-4 and found.columns == {"a": "b"}
    import os

    assert os.environ["MCB_A"] == "1" and os.environ["MCB_B"] == "kept"
    (tmp_path / "run.json").write_text(json.dumps({"model": "n"}))
    assert sft(str(tmp_path / "run.json")).model == "n"
    (tmp_path / "bad.yaml").write_text("modle: m\n")
    with pytest.raises(ValueError, match="--model"):
        sft(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    "words, text",
    [
        (["--modle", "x"], "--model"),
        (["--packing", "maybe"], "neither true nor false"),
        (["--train_iters", "many"], "train_iters"),
        (["--lr_decay_style", "sideways"], "cosine"),
        (["--columns", "{"], "not JSON"),
        (["--lazy_tokenize", "true"], "not supported"),
        (["--fp4_format", "e2m1"], "not supported"),
        (["--moe_enable_deepep", "true"], "moe_enable_deepep true is not supported"),
        (["--bf16", "true"], "not supported"),
        (["stray"], "no flag"),
    ],
)
def test_bad_flags(words, text):
    with pytest.raises(ValueError, match=text):
        sft(*words)


def test_flags_of_the_original_that_change_nothing():
    sft(
        "--attention_backend",
        "flash",
        "--finetune",
        "true",
        "--no_save_optim",
        "true",
        "--recompute_granularity",
        "none",
        "--optimizer",
        "adam",
        "--moe_aux_loss_coeff",
        "0",
        "--muon_momentum",
        "0.9",
    )


def test_no_flag_is_both_ours_and_unsupported():
    ours = {field.name for kind in (TrainArguments, ExportArguments, VerifyArguments) for field in dataclasses.fields(kind)}
    assert not ours & set(NEUTRAL)


def test_system_from_a_file(tmp_path):
    (tmp_path / "system.txt").write_text("You are terse.\n")
    assert _derived(sft("--model", "m", "--system", str(tmp_path / "system.txt")), "sft").system == "You are terse."
    assert _derived(sft("--model", "m", "--system", "none.txt"), "sft").system == "none.txt"


def test_help_names_every_flag(capsys):
    text = parser(TrainArguments, "sft").format_help()
    assert "--tensor_model_parallel_size" in text and "Parallelism" in text and "(default: cosine)" in text
    assert main([]) == 2 and main(["--help"]) == 0 and main(["dance"]) == 2
    assert "inspect" in capsys.readouterr().out


def test_launching():
    assert torchrun_command(["sft"], {}) is None
    assert torchrun_command(["sft"], {"NPROC_PER_NODE": "4", "RANK": "0"}) is None
    alone = torchrun_command(["sft", "--x"], {"NPROC_PER_NODE": "4"})
    assert "--standalone" in alone and "--nproc_per_node=4" in alone and alone[-4:] == ["-m", "mcore_bridge", "sft", "--x"]
    many = torchrun_command(
        ["sft"], {"NPROC_PER_NODE": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    )
    assert {"--nnodes=2", "--node_rank=1", "--master_addr=a", "--master_port=1"} <= set(many) and "--standalone" not in many


def test_sharding_strategies():
    """use_megatron_fsdp means full sharding unless the strategy says otherwise; every optimizer flag has the engine's default."""
    from mcore_bridge.training.options import OPTIMIZER_OPTIONS

    assert _derived(sft(), "sft").data_parallel_sharding_strategy is None
    full = _derived(sft("--use_megatron_fsdp", "true", "--accumulate_allreduce_grads_in_fp32", "false"), "sft")
    assert full.data_parallel_sharding_strategy == "optim_grads_params" and full.main_grads_dtype == "bf16"
    flags = {field.name for field in dataclasses.fields(TrainArguments)}
    assert set(OPTIMIZER_OPTIONS) <= flags and not flags & NEUTRAL.keys()
