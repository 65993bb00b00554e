"""The commands end to end on a tiny chat model."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from launch import environment
from safetensors.torch import load_file

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("cli")
    tiny.save("qwen3_tied", path / "model", max_shard_size="5GB")
    words = ["<pad>", "<unk>", "</s>", "<user>", "<assistant>", *[f"w{index}" for index in range(60)]]
    base = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path / "model")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{i % 7} w{i % 5}"},
                {"role": "assistant", "content": f"w{i % 3 + 10} w{i % 3 + 20} w30"},
            ]
        }
        for i in range(40)
    ]
    (path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "plain.txt").write_text("".join(f"w{i % 9} w{i % 4} w5 w6\n" for i in range(60)))
    return path


def bridge(*words, processes=1, timeout=300):
    env = environment()
    if processes > 1:
        env["NPROC_PER_NODE"] = str(processes)
    return subprocess.run(
        [sys.executable, "-m", "mcore_bridge", *map(str, words)],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def succeeds(*words, processes=1):
    finished = bridge(*words, processes=processes)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-5000:]
    return finished.stdout


COMMON = [
    "--torch_dtype",
    "float32",
    "--train_iters",
    6,
    "--global_batch_size",
    4,
    "--max_length",
    32,
    "--add_version",
    "false",
    "--logging_steps",
    1,
]


def records(folder):
    return [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]


def test_lora_on_two_processes(work):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = (work / "model/model.safetensors").read_bytes()
    out = work / "lora"
    succeeds(
        "sft", "--model", work / "model", "--dataset", work / "chat.jsonl", *COMMON, "--tuner_type", "lora", "--lora_rank", 4, "--lr", 1e-2,
        "--tensor_model_parallel_size", 2, "--sequence_parallel", "true", "--packing", "true", "--merge_lora", "true", "--output_dir", out,
        "--save_steps", 2, "--save_total_limit", 2, "--split_dataset_ratio", 0.2, "--eval_steps", 3, processes=2,
    )  # fmt: skip
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [f"checkpoint-{n}{s}" for n in (4, 6) for s in ("", "-merged")]
    lines = records(out)
    steps = [r for r in lines if "loss" in r]
    assert [r["iteration"] for r in steps] == [1, 2, 3, 4, 5, 6] and steps[-1]["loss"] < steps[0]["loss"]
    assert {"grad_norm", "lr", "tokens_per_second", "memory_gib"} <= set(steps[0])
    assert [r["iteration"] for r in lines if "eval_loss" in r] == [3, 6] and lines[-1]["summary"]
    assert (out / "curves.png").exists() and list((out / "runs").iterdir())
    assert (work / "model/model.safetensors").read_bytes() == before

    adapter, merged = out / "checkpoint-6", out / "checkpoint-6-merged"
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(work / "model"), adapter).eval()
    merged_model = AutoModelForCausalLM.from_pretrained(merged).eval()
    AutoTokenizer.from_pretrained(merged)
    AutoTokenizer.from_pretrained(adapter)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert tiny.relative(peft_model(ids).logits, merged_model(ids).logits) < 2e-5

    assert "ok" in succeeds("verify", "--model", work / "model", "--adapters", adapter, "--torch_dtype", "float32")
    assert "ok" in succeeds("verify", "--model", merged, "--pipeline_model_parallel_size", 2, "--text", "w1 w2 w3", processes=2)

    exported = work / "exported"
    succeeds(
        "export",
        "--model",
        work / "model",
        "--adapters",
        adapter,
        "--merge_lora",
        "true",
        "--output_dir",
        exported,
        "--max_shard_size",
        "40KB",
    )
    one, several = load_file(merged / "model.safetensors"), {}
    for file in exported.glob("*.safetensors"):
        several.update(load_file(file))
    assert len(list(exported.glob("*.safetensors"))) > 1
    # Merged by the engine and offline: the same sums, in another order.
    assert all(tiny.relative(several[name], tensor) < 1e-6 for name, tensor in one.items())
    assert bridge("export", "--model", work / "model", "--output_dir", exported).returncode == 1, "the folder exists"

    # Going on from the adapter.
    more = work / "more"
    succeeds(
        "sft",
        "--model",
        work / "model",
        "--adapters",
        adapter,
        "--dataset",
        work / "chat.jsonl",
        *COMMON,
        "--lr",
        1e-3,
        "--output_dir",
        more,
    )
    assert records(more)[0]["loss"] < steps[0]["loss"]


def test_full_training_is_the_same_on_every_layout(work):
    losses = {}
    succeeds(
        "export", "--model", work / "model", "--to_mcore", "true", "--torch_dtype", "float32", "--output_dir", work / "mcore"
    )
    model, megatron = ["--model", work / "model"], ["--mcore_model", work / "mcore"]
    for name, processes, flags in [
        ("one", 1, model),
        ("dp2", 2, model),
        ("pp2", 2, [*model, "--pipeline_model_parallel_size", 2]),
        ("cp2", 2, [*model, "--context_parallel_size", 2, "--cp_comm_type", "all_gather"]),
        ("megatron_tp2", 2, [*megatron, "--tensor_model_parallel_size", 2]),
    ]:
        out = work / f"full-{name}"
        succeeds(
            "pt",
            "--dataset",
            work / "plain.txt",
            *COMMON,
            "--lr",
            1e-3,
            *flags,
            "--output_dir",
            out,
            processes=processes,
        )
        losses[name] = [r["loss"] for r in records(out) if "loss" in r]
        assert (out / "checkpoint-6/config.json").exists() and (out / "checkpoint-6/tokenizer.json").exists()
    assert losses["one"] == pytest.approx(losses["dp2"], abs=1e-5)
    assert losses["one"] == pytest.approx(losses["pp2"], abs=1e-5)
    assert losses["one"] == pytest.approx(losses["cp2"], abs=1e-5)
    assert losses["one"] == pytest.approx(losses["megatron_tp2"], abs=1e-5)
    flags = ["--context_parallel_size", 2, "--cp_comm_type", "a2a", "--text", "w1 w2 w3", "--torch_dtype", "float32"]
    assert "ok" in succeeds("verify", "--model", work / "full-cp2/checkpoint-6", *flags, processes=2)


def test_evaluation_covers_every_sample_once(work):
    """3 samples in global batches of 4 and over any data-parallel size: the loss is that of the 3, whatever fills the batch."""
    (work / "three.jsonl").write_text("".join((work / "chat.jsonl").read_text().splitlines(keepends=True)[:3]))
    losses = []
    for processes, flags in [
        (1, ["--global_batch_size", 1]),
        (1, []),
        (2, ["--packing", "true"]),
        (2, ["--padding_free", "false"]),
    ]:
        out = work / f"eval{len(losses)}"
        succeeds("sft", "--model", work / "model", "--dataset", work / "chat.jsonl", "--val_dataset", work / "three.jsonl", *COMMON,
                 "--train_iters", 1, "--lr", 0, *flags, "--output_dir", out, "--report_to", "none", processes=processes)  # fmt: skip
        losses += [r["eval_loss"] for r in records(out) if "eval_loss" in r]
    assert len(losses) == 4 and losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    succeeds("sft", "--model", work / "model", "--dataset", work / "chat.jsonl", "--val_dataset", work / "three.jsonl", *COMMON,
             "--eval_iters", 0, "--output_dir", work / "none", "--report_to", "none")  # fmt: skip
    assert not [r for r in records(work / "none") if "eval_loss" in r]


def test_rope_scaling_is_saved_with_the_weights(work):
    out, scaling = work / "rope", '{"type": "linear", "factor": 2.0}'
    succeeds("sft", "--model", work / "model", "--dataset", work / "chat.jsonl", *COMMON, "--lr", 1e-3, "--rope_scaling", scaling,
             "--output_dir", out, "--report_to", "none", "--deterministic_mode", "true")  # fmt: skip
    checkpoint = out / "checkpoint-6"
    assert json.loads((checkpoint / "config.json").read_text())["rope_parameters"] == {
        "rope_theta": 10000.0,
        "rope_type": "linear",
        "factor": 2.0,
    }
    # Transformers reads the scaling from the checkpoint, the engine takes it from the flag.
    assert "ok" in succeeds("verify", "--model", checkpoint, "--rope_scaling", scaling)


def test_random_start_and_versions(work):
    bare = work / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        os.link(work / "model" / name, bare / name)
    for _ in range(2):
        succeeds("pt", "--model", bare, "--dataset", work / "plain.txt", "--perform_initialization", "true", "--train_iters", 1, "--max_length", 16,
                 "--output_dir", work / "versions", "--report_to", "none")  # fmt: skip
    versions = sorted(path.name.split("-")[0] for path in (work / "versions").iterdir())
    assert versions == ["v0", "v1"]


def test_verify_fails_when_the_weights_differ(work, tmp_path):
    assert bridge("verify", "--model", work / "model", "--tolerance", 1e-12, "--torch_dtype", "float32").returncode == 1


def test_inspect(work):
    text = succeeds("inspect", work / "model")
    assert "model.layers.*.self_attn.q_proj.weight" in text and "F32" in text
    content = json.loads(succeeds("inspect", "--model", work / "model", "--json", "true"))
    assert content["format"] == "model" and len(content["tensors"]) == len(load_file(work / "model/model.safetensors"))


@pytest.mark.parametrize(
    "words, text, processes",
    [
        (["--model", "{model}", "--dataset", "{chat}", "--tensor_model_parallel_size", "3"], "tensor_model_parallel_size 3", 1),
        (["--model", "{model}", "--dataset", "{chat}", "--pipeline_model_parallel_size", "2"], "2", 1),
        (["--model", "/nowhere", "--dataset", "{chat}"], "/nowhere", 1),
        (["--model", "{model}", "--dataset", "/nowhere.jsonl"], "/nowhere.jsonl", 2),
        (["--model", "{model}", "--dataset", "{chat}", "--global_batch_size", "3"], "global_batch_size", 2),
        (["--model", "{model}", "--dataset", "{chat}", "--tuner_type", "lora", "--target_modules", "q_porj"], "q_porj", 2),
        (["--model", "{model}"], "--dataset", 1),
    ],
)  # fmt: skip
def test_errors_are_one_clear_message(work, words, text, processes):
    words = [word.format(model=work / "model", chat=work / "chat.jsonl") for word in words]
    out = work / "never"
    finished = bridge("sft", *words, "--train_iters", 1, "--output_dir", out, processes=processes, timeout=120)
    assert finished.returncode != 0
    messages = [line for line in finished.stderr.splitlines() if line.startswith("mcore-bridge:")]
    assert len(messages) == 1, "every rank sees the mistake, one names it"
    assert text in messages[0]
    assert "Traceback" not in finished.stderr.split("torch.distributed")[0]
    assert not list(out.glob("**/*.safetensors"))
