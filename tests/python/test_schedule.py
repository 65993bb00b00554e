"""mcore-bridge schedule: the tables as text and chart."""

import re

import pytest
from mcore_bridge.cli.main import main


def shown(capsys, *flags):
    code = main(["schedule", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_forward_one_backward(capsys):
    code, out, _ = shown(capsys, "--pipeline_model_parallel_size", "2", "--micro_batches", "3")
    assert code == 0
    assert "bubble 25.0%" in out and "by stage: 2, 1" in out
    lines = [line for line in out.splitlines() if re.match(r" +\d ", line)]
    assert [re.findall(r"[FB]\d", line) for line in lines] == [
        ["F0", "F1", "B0", "F2", "B1", "B2"],
        ["F0", "B0", "F1", "B1", "F2", "B2"],
    ]


def test_interleaved_and_its_messages(capsys):
    flags = [
        "--pipeline_model_parallel_size",
        "2",
        "--virtual_pipeline_model_parallel_size",
        "2",
        "--micro_batches",
        "2",
        "--table",
        "true",
    ]
    code, out, _ = shown(capsys, *flags)
    assert code == 0 and "interleaved" in out and "F1b" in out
    # Chunk 1 is the last stage's first one; its output goes back to the first stage, for chunk 2.
    assert "send activation of chunk 1, micro-batch 0 to 0" in out
    assert "receive gradient of chunk 2, micro-batch 1 from 1" in out


def test_zero_bubble_beats_one_forward_one_backward(capsys):
    bubbles = []
    for schedule in ("1f1b", "zb-h1"):
        _, out, _ = shown(capsys, "--pipeline_schedule", schedule, "--micro_batches", "12")
        bubbles.append(float(re.search(r"bubble ([\d.]+)%", out)[1]))
    assert bubbles == [20.0, 7.7]  # 3 / 15 and 3 / 39


def test_costs(capsys):
    _, out, _ = shown(capsys, "--micro_batches", "1", "--forward_cost", "2", "--exchange_cost", "0.5")
    assert "time 19," in out  # one micro-batch through 4 stages and back: 4 x (2 + 1 + 1) and 6 messages


def test_plot(capsys, tmp_path):
    code, _, _ = shown(capsys, "--plot", str(tmp_path / "chart.png"))
    assert code == 0
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, text",
    [
        ("--pipeline_schedule zb-h1 --virtual_pipeline_model_parallel_size 2", "zb-h1"),
        ("--pipeline_model_parallel_size 0", "at least 1"),
        ("--forward_cost -1", "not a time"),
        ("--plot chart.nonsense", "chart.nonsense"),
    ],
)
def test_errors(capsys, flags, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = shown(capsys, *flags.split())
    assert code and text in err
