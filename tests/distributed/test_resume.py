"""A run that was interrupted goes on as if it had not been: bit for bit on the same layout, closely on any other."""

import json
import shutil
import time

import chat_model
import pytest
import tiny
import torch
from launch import HERE, launch
from safetensors.torch import load_file

STEPS = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return chat_model.make(tmp_path_factory.mktemp("resume"), num_hidden_layers=2)


def jobs(work, name, processes, *job, torchrun=()):
    """Results of resume_worker.py by the jobs' names."""
    path, out = work / f"{name}.json", work / f"{name}-out.json"
    path.write_text(json.dumps(job))
    finished = launch([HERE / "resume_worker.py", path, out], processes, torchrun=torchrun)
    said = {one["name"]: (work / f"{out.name}.{one['name']}.txt") for one in job}
    said = {key: value.read_text() if value.exists() else "" for key, value in said.items()}
    assert finished.returncode == 0, f"{said}\n{finished.stdout[-3000:]}\n{finished.stderr[:6000]}"
    results = json.loads(out.read_text())
    for key, result in results.items():
        result["said"] = said[key]
    return results


def argv(work, output, *more, dtype="float32", steps=STEPS):
    return [
        *map(
            str,
            [
                "--model", work / "model", "--dataset", work / "chat.jsonl", "--torch_dtype", dtype, "--train_iters", steps, "--global_batch_size", 8,
                "--micro_batch_size", 1, "--max_length", 32, "--lr", 1e-2, "--lr_warmup_iters", 2, "--add_version", "false", "--output_dir",
                work / output, "--save_steps", 100, "--report_to", "none", "--logging_steps", 1, *more,
            ],
        )
    ]  # fmt: skip


def state(folder):
    return {
        f"{path.stem.split('-0')[0]}/{name}": tensor
        for path in sorted((folder / "training_state").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same_bits(left, right):
    assert left.keys() == right.keys() and left
    for name in left:
        assert torch.equal(left[name], right[name]), name


def close(left, right, tolerance=1e-5):
    assert left.keys() == right.keys() and left
    for name in left:
        assert tiny.relative(left[name].float(), right[name].float()) < tolerance, name


TENSORWISE = ["--fp8_format", "hybrid", "--fp8_recipe", "tensorwise", "--fp8_param_gather", "true"]
VARIANTS = {
    "full-bf16": ("bfloat16", []),
    "remainders": ("bfloat16", ["--store_param_remainders", "true"]),
    "fp8": ("bfloat16", ["--fp8_format", "hybrid", "--fp8_amax_history_len", 3]),
    "fp8-param": ("bfloat16", ["--fp8_format", "hybrid", "--fp8_param_gather", "true", "--tuner_type", "lora", "--lora_rank", 4]),
    "fp8-trained": ("bfloat16", ["--fp8_format", "hybrid", "--fp8_param_gather", "true", "--fp8_amax_history_len", 3]),
    "fp8-trained-dp2": (
        "bfloat16",
        [*TENSORWISE, "--tensor_model_parallel_size", 1, "--sequence_parallel", "false", "--optimizer", "muon"],
    ),
    "lora": (
        "float32",
        [
            "--tuner_type",
            "lora",
            "--lora_rank",
            4,
            "--lora_dropout",
            0.2,
            "--packing",
            "true",
            "--modules_to_save",
            "embed_tokens",
            "lm_head",
        ],
    ),
}


def test_same_layout_bit_for_bit(work):
    """Two processes with tensor parallelism, optimizer in fp32 over bf16 weights and LoRA with dropout: stopping changes nothing."""
    todo = []
    for name, (dtype, more) in VARIANTS.items():
        layout = ["--tensor_model_parallel_size", 2, "--sequence_parallel", "true", "--max_shard_size", "60KB"]
        whole = argv(work, f"{name}-whole", *layout, *more, dtype=dtype)
        parts = argv(work, f"{name}-parts", *layout, *more, "--resume_from_checkpoint", "auto", dtype=dtype)
        todo += [
            dict(name=f"{name}-whole", argv=whole),
            dict(name=f"{name}-first", argv=parts, stop_after=2),
            dict(name=f"{name}-second", argv=[*parts, "--async_save", "true", "--save_steps", "1"], stop_after=4),
            dict(name=f"{name}-third", argv=parts),
        ]
    results = jobs(work, "same", 2, *todo)
    for name in VARIANTS:
        assert [results[f"{name}-{part}"]["start"] for part in ("whole", "first", "second", "third")] == [0, 0, 2, 4]
        parts = [step for part in ("first", "second", "third") for step in results[f"{name}-{part}"]["steps"]]
        assert parts == results[f"{name}-whole"]["steps"], "losses, gradient norms, learning rates and rows"
        whole, resumed = work / f"{name}-whole/checkpoint-6", work / f"{name}-parts/checkpoint-6"
        same_bits(tiny.stored(whole), tiny.stored(resumed))
        same_bits(state(whole), state(resumed))
        texts = [json.loads((folder / "training_state/state.json").read_text()) for folder in (whole, resumed)]
        for key in ("step", "consumed_samples", "consumed_tokens", "lr", "data", "recent_losses", "first_loss", "optimizer"):
            assert texts[0][key] == texts[1][key], key
        generators = [json.loads((folder / "training_state/rng.json").read_text()) for folder in (whole, resumed)]
        assert [one["torch"] for one in generators[0].values()] == [one["torch"] for one in generators[1].values()]
        if name in ("fp8", "fp8-trained"):  # what the next step's scales come from
            histories = [json.loads((folder / "training_state/fp8.json").read_text()) for folder in (whole, resumed)]
            assert histories[0] == histories[1] and len(histories[0]) == 8  # four linear layers a layer
        assert "training waited" in results[f"{name}-second"]["said"]
        records = [json.loads(line) for line in (work / f"{name}-parts/logging.jsonl").read_text().splitlines()]
        assert [record["iteration"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    # bf16 weights: the masters are theirs, rounded.
    for name in ("fp8-trained", "fp8-trained-dp2", "full-bf16"):
        saved = work / f"{name}-whole/checkpoint-6"
        masters = {key.split("/")[1]: value for key, value in state(saved).items() if key.startswith("master/")}
        same_bits(tiny.stored(saved), {name: tensor.bfloat16() for name, tensor in masters.items()})
    assert {key.split("/")[0] for key in state(saved)} == {"master", "exp_avg", "exp_avg_sq"}
    assert not any(path.name.startswith(".") for path in (work / "full-bf16-parts").iterdir())
    text = json.loads((saved / "training_state/state.json").read_text())
    assert text["step"] == 6 and text["consumed_samples"] == 48 and text["layout"]["tensor"] == 2
    listed = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()} - {"training_state/state.json"}
    assert set(text["files"]) == listed
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(saved)


LAYOUTS = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["--tensor_model_parallel_size", 2]),
    "pp2": (2, ["--pipeline_model_parallel_size", 2]),
    "cp2": (2, ["--context_parallel_size", 2]),  # pads documents, but what was packed together stays together
}
SOURCES = {"one": "tp2", "dp2": "pp2", "tp2": "dp2", "pp2": "one", "cp2": "one"}


def test_trained_fp8_weights_on_any_layout(work):
    """Masters and weights that another layout loads, and saves after a step that moves nothing, are those that were saved."""
    first = argv(work, "fp8-from", "--tensor_model_parallel_size", 2, *TENSORWISE, dtype="bfloat16", steps=3)
    jobs(work, "fp8-from", 2, dict(name="fp8-from", argv=first))
    source = work / "fp8-from/checkpoint-3"
    resume = [*TENSORWISE, "--resume_from_checkpoint", source, "--lr", 0]
    for name, (processes, layout) in LAYOUTS.items():
        if name == "tp2":
            continue
        command = argv(work, f"fp8-to-{name}", *layout, *resume, dtype="bfloat16", steps=4)
        results = jobs(work, f"fp8-to-{name}", processes, dict(name=name, argv=command))
        assert results[name]["start"] == 3 and len(results[name]["steps"]) == 1
        end = work / f"fp8-to-{name}/checkpoint-4"
        same_bits(tiny.stored(end), tiny.stored(source))
        masters = ({key: value for key, value in state(folder).items() if key.startswith("master/")} for folder in (source, end))
        same_bits(*masters)


def by_processes(work, name, todo):
    """Results of jobs given as (processes, job), one launch for each number of processes."""
    results = {}
    for processes in sorted({processes for processes, _ in todo}):
        results |= jobs(work, f"{name}{processes}", processes, *[job for count, job in todo if count == processes])
    return results


def check_other_layouts(work, variants, layouts, sources):
    """Stopped on one layout and gone on with on another (another number of ranks too): as on one rank without stopping."""
    todo = []
    for variant, more in variants.items():
        todo.append((1, dict(name=f"{variant}-whole", argv=argv(work, f"{variant}-whole", *more))))
        for name in sorted(set(sources.values())):
            processes, layout = layouts[name]
            todo.append(
                (processes, dict(name=f"{variant}-{name}", argv=argv(work, f"{variant}-{name}", *layout, *more), stop_after=3))
            )
    first = by_processes(work, "first", todo)
    todo = []
    for variant, more in variants.items():
        for name, source in sources.items():
            processes, layout = layouts[name]
            resume = ["--resume_from_checkpoint", work / f"{variant}-{source}/checkpoint-3"]
            command = argv(work, f"{variant}-{source}-to-{name}", *layout, *more, *resume)
            todo.append((processes, dict(name=f"{variant}-{name}", argv=command)))
    second = by_processes(work, "second", todo)
    for variant in variants:
        whole = first[f"{variant}-whole"]["steps"]
        reference = work / f"{variant}-whole/checkpoint-6"
        for name, source in sources.items():
            steps = first[f"{variant}-{source}"]["steps"] + second[f"{variant}-{name}"]["steps"]
            assert [step[3] for step in steps] == [step[3] for step in whole], (source, name)
            for step, expected in zip(steps, whole):
                assert step[0] == pytest.approx(expected[0], rel=1e-5) and step[1] == pytest.approx(expected[1], rel=1e-4)
            end = work / f"{variant}-{source}-to-{name}/checkpoint-6"
            close(tiny.stored(end), tiny.stored(reference))
            close(state(end), state(reference), 2e-4)


def test_remainders_go_on_as_remainders(work):
    flag = "--store_param_remainders"
    first = argv(work, "halves", flag, "true", dtype="bfloat16")
    jobs(work, "halves", 1, dict(name="written", argv=first, stop_after=2))
    kinds = {key.split("/")[0]: value.dtype for key, value in state(work / "halves/checkpoint-2").items()}
    assert kinds == {"remainder": torch.int16, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    path = work / "halves-whole.json"
    resumed = argv(work, "halves", "--resume_from_checkpoint", "auto", dtype="bfloat16")
    path.write_text(json.dumps([dict(name="whole", argv=resumed)]))
    finished = launch([HERE / "resume_worker.py", path, work / "halves-out.json"], 1)
    assert finished.returncode != 0
    said = finished.stdout + finished.stderr
    assert "was written with store_param_remainders; resume with store_param_remainders true" in said


def test_other_layouts(work):
    packing = ["--packing", "true", "--packing_length", 24]
    lora = [*packing, "--tuner_type", "lora", "--lora_rank", 4, "--lora_dropout", 0]
    check_other_layouts(work, {"full": packing, "lora": lora}, LAYOUTS, SOURCES)


EP = "--expert_model_parallel_size"
TP_SP = ["--tensor_model_parallel_size", 2, "--sequence_parallel", "true"]
MOE_LAYOUTS = {
    "one": (1, []),
    "ep2": (2, [EP, 2]),
    "ep4": (4, [EP, 4]),
    "ep2tp2": (4, [EP, 2, *TP_SP]),
    "ep2etp2": (4, [EP, 2, *TP_SP, "--expert_tensor_parallel_size", 2]),
    "ep2pp2": (4, [EP, 2, "--pipeline_model_parallel_size", 2]),
    "ep2-full": (4, [EP, 2, "--data_parallel_sharding_strategy", "optim_grads_params"]),
}


def test_other_expert_layouts(tmp_path):
    """The correction bias of the routers, which moves after every step, goes along."""
    work = chat_model.make(tmp_path, "glm4_moe", num_hidden_layers=2, attention_bias=False)
    check_other_layouts(work, {"full": []}, MOE_LAYOUTS, {"one": "ep2tp2", "ep2tp2": "ep4", "ep4": "one", "ep2pp2": "ep2tp2"})


@pytest.mark.slow
def test_every_expert_layout(tmp_path):
    work = chat_model.make(tmp_path, "glm4_moe", num_hidden_layers=2, attention_bias=False)
    order = list(MOE_LAYOUTS)
    sources = {name: order[(order.index(name) + shift) % len(order)] for shift, name in enumerate(order, 1)}
    lora = ["--tuner_type", "lora", "--lora_rank", 4, "--lora_dropout", 0, "--adam_eps", 1e-3]
    check_other_layouts(work, {"full": [], "lora": lora}, MOE_LAYOUTS, sources)


SHARDING = "--data_parallel_sharding_strategy"
MATRIX = {
    "one": (1, []),
    "dp2-unsharded": (2, ["--use_distributed_optimizer", "false"]),
    "dp4-grads": (4, [SHARDING, "optim_grads"]),
    "cp2": (2, ["--context_parallel_size", 2]),
    "dp2-full": (2, [SHARDING, "optim_grads_params"]),
    "vpp2": (2, ["--pipeline_model_parallel_size", 2, "--virtual_pipeline_model_parallel_size", 2]),
    "tp2cp2": (4, ["--tensor_model_parallel_size", 2, "--sequence_parallel", "true", "--context_parallel_size", 2]),
    "cp2dp2-full": (4, ["--context_parallel_size", 2, SHARDING, "optim_grads_params"]),
    "dp4": (4, ["--overlap_grad_reduce", "true", "--overlap_param_gather", "true"]),
    "vpp2dp2": (4, ["--pipeline_model_parallel_size", 2, "--virtual_pipeline_model_parallel_size", 2]),
    "tp2pp2-zb": (4, ["--tensor_model_parallel_size", 2, "--pipeline_model_parallel_size", 2, "--pipeline_schedule", "zb-h1"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["full", "lora"])
def test_layout_matrix(tmp_path, variant):
    """Every layout goes on from its own checkpoint bit for bit, and from another's as one rank does."""
    work = chat_model.make(tmp_path, num_hidden_layers=4)
    # Adam divides by the root of the second moment: where LoRA's gradients are next to nothing (q_proj's B in the beginning), the
    # layouts' rounding grows to 6e-5 of the weights without any stop. A larger epsilon keeps it below what is looked for.
    lora = ["--tuner_type", "lora", "--lora_rank", 4, "--lora_dropout", 0, "--adam_eps", 1e-3]
    more = lora if variant == "lora" else []
    order, whole, again = list(MATRIX), {}, {}

    def source_of(name):
        return order[(order.index(name) + 4) % len(order)]

    for results, starts in ((whole, {"": None}), (again, {"-same": lambda name: name, "-other": source_of})):
        todo = []
        for name, (processes, layout) in MATRIX.items():
            for suffix, source in starts.items():
                resume = ["--resume_from_checkpoint", work / source(name) / "checkpoint-3"] if source else []
                command = argv(work, name + suffix, *layout, *more, "--save_steps", 3, *resume)
                todo.append((processes, dict(name=name + suffix, argv=command)))
        results |= by_processes(work, f"{variant}{len(starts)}", todo)
    expected, end = whole["one"]["steps"], "checkpoint-6"
    for name in MATRIX:
        for steps in (whole[name]["steps"], again[f"{name}-other"]["steps"]):
            reference = expected[-len(steps) :]
            assert [step[3] for step in steps] == [step[3] for step in reference], name
            for step, other in zip(steps, reference):
                assert step[0] == pytest.approx(other[0], rel=1e-5) and step[1] == pytest.approx(other[1], rel=1e-4), name
        assert again[f"{name}-same"]["steps"] == whole[name]["steps"][3:], name
        same_bits(tiny.stored(work / name / end), tiny.stored(work / f"{name}-same" / end))
        same_bits(state(work / name / end), state(work / f"{name}-same" / end))
        close(tiny.stored(work / f"{name}-other" / end), tiny.stored(work / "one" / end))
        close(state(work / f"{name}-other" / end), state(work / "one" / end), 2e-4)


def test_data_positions(work):
    """Streamed, interleaved and shuffled data: the same rows at every step, however often and wherever the run stops."""
    kinds = {
        "stream": ["--streaming", "true", "--shuffle_buffer_size", 7],
        "stream-packed": ["--streaming", "true", "--shuffle_buffer_size", 9, "--packing", "true", "--packing_length", 24],
        "mixed": ["--dataset", work / "chat.jsonl", work / "more.jsonl", "--interleave_prob", 0.7, 0.3],
        "stream-mixed": [
            "--dataset", work / "chat.jsonl", work / "more.jsonl", "--interleave_prob", 0.4, 0.6, "--streaming", "true",
            "--shuffle_buffer_size", 5, "--stopping_strategy", "all_exhausted",
        ],
    }  # fmt: skip
    lines = (work / "chat.jsonl").read_text().splitlines()
    (work / "more.jsonl").write_text("\n".join(lines[:9]) + "\n")
    first, again = [], []
    for name, more in kinds.items():
        command = argv(work, f"data-{name}", *more, "--dataloader_num_workers", 2, "--resume_from_checkpoint", "auto", steps=10)
        first.append(dict(name=name, argv=command, stop_after=4))
        again.append(dict(name=name, argv=[*command[:-2], "--resume_from_checkpoint", "auto", "--dataloader_num_workers", "0"]))
        whole = argv(work, f"data-{name}-whole", *more, steps=10)
        first.append(dict(name=f"{name}-whole", argv=whole))
    one = jobs(work, "data-one", 1, *first)
    two = jobs(work, "data-two", 2, *again)
    for name in kinds:
        rows = [step[3] for step in one[f"{name}-whole"]["steps"]]
        assert [step[3] for step in one[name]["steps"] + two[name]["steps"]] == rows, name
        if name == "stream":
            flat = [row for step in rows for row in step][:40]
            assert sorted(row for _, row in flat) == list(range(40)), "an epoch is every row once"


def test_damage_is_named_and_the_previous_one_used(work):
    base = argv(work, "damaged", "--save_steps", 2)
    jobs(work, "damage", 1, dict(name="run", argv=base))
    folder = work / "damaged"
    shard = folder / "checkpoint-6/training_state/exp_avg.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    (folder / "checkpoint-4/model.safetensors").unlink()
    (folder / ".checkpoint-8.saving").mkdir()
    auto = [*base, "--resume_from_checkpoint", "auto"]
    explicit = [*argv(work, "elsewhere"), "--resume_from_checkpoint", str(folder / "checkpoint-6")]
    results = jobs(work, "damage2", 1, dict(name="explicit", argv=explicit), dict(name="auto", argv=auto))
    for result in results.values():
        assert result["start"] == 2
        assert "exp_avg.safetensors does not match its checksum" in result["said"]
        assert "model.safetensors is missing" in result["said"]
    assert not (folder / ".checkpoint-8.saving").exists()


def test_limits_links_and_fresh_starts(work):
    base = argv(
        work,
        "limited",
        "--save_steps",
        1,
        "--save_total_limit",
        2,
        "--create_checkpoint_symlink",
        "true",
        "--greater_is_better",
        "true",
    )
    more = dict(
        name="finetune", argv=[*argv(work, "tuned"), "--resume_from_checkpoint", str(work / "limited"), "--finetune", "true"]
    )
    other_data = [*argv(work, "limited"), "--resume_from_checkpoint", "auto", "--dataset", str(work / "chat.jsonl") + "#20"]
    slim = argv(work, "slim", "--no_save_optim", "true", "--no_save_rng", "true")
    results = jobs(
        work,
        "limits",
        1,
        dict(name="run", argv=base),
        more,
        dict(name="other", argv=other_data, error=True),
        dict(name="slim", argv=slim, stop_after=2),
        dict(name="fat", argv=[*slim, "--resume_from_checkpoint", "auto"], error=True),
        dict(name="fresh", argv=[*slim, "--resume_from_checkpoint", "auto", "--no_load_optim", "true"]),
    )
    folder = work / "limited"
    losses = [step[0] for step in results["run"]["steps"]]
    best = losses.index(max(losses)) + 1  # with greater_is_better the best is the first: it must survive
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == sorted({f"checkpoint-{best}", "checkpoint-6"})
    assert (folder / "last").resolve().name == "checkpoint-6" and (folder / "best").resolve().name == f"checkpoint-{best}"
    assert results["finetune"]["start"] == 0 and len(results["finetune"]["steps"]) == 6
    assert "not what the checkpoint was trained on" in results["other"]["error"]
    assert sorted(path.name for path in (work / "slim/checkpoint-6/training_state").iterdir()) == ["state.json"]
    assert "without its optimizer" in results["fat"]["error"] and results["fresh"]["start"] == 2


@pytest.mark.slow
def test_restarts_of_torchrun_go_on_by_themselves(work):
    whole = jobs(work, "restart-whole", 2, dict(name="whole", argv=argv(work, "restart-whole", "--save_steps", 1)))["whole"]
    job = dict(name="restart", argv=argv(work, "restart", "--save_steps", 1), die_after=3)
    result = jobs(work, "restart", 2, job, torchrun=["--max-restarts=1"])["restart"]
    # The checkpoint of step 3 was not asked for yet: only what was whole before the kill counts.
    assert result["start"] == 2 and result["steps"] == whole["steps"][2:]
    same_bits(tiny.stored(work / "restart-whole/checkpoint-6"), tiny.stored(work / "restart/checkpoint-6"))
    # Killed before its first checkpoint, a run begins where it began, whatever an older run has left in the folder.
    shutil.copytree(work / "restart-whole/checkpoint-6", work / "early/checkpoint-5")
    command = argv(work, "early", "--resume_from_checkpoint", work / "restart-whole/checkpoint-2")
    early = jobs(work, "early", 2, dict(name="early", argv=command, die_after=4), torchrun=["--max-restarts=1"])["early"]
    assert early["start"] == 2 and early["steps"] == whole["steps"][2:]
    lines = (work / "early/logging.jsonl").read_text().splitlines()
    assert [json.loads(line).get("iteration") for line in lines] == [3, 4, 5, 6, None]


@pytest.mark.slow
def test_a_signal_ends_a_rank_in_a_collective_that_never_ends(work):
    path = work / "frozen.json"
    path.write_text(json.dumps([dict(name="frozen", argv=argv(work, "frozen"), freeze_after=2)]))
    begin = time.monotonic()
    finished = launch([HERE / "resume_worker.py", path, work / "frozen-out.json"], 2)
    # torchrun itself gives the stopped rank half a minute.
    assert finished.returncode != 0 and time.monotonic() - begin < 90
    assert "rank 0: ended by SIGTERM without a checkpoint: 1 of 2 ranks are gone" in finished.stderr


def test_full_disk_does_not_end_the_training(work):
    todo = []
    for name, background in (("sync", "false"), ("async", "true")):
        command = argv(work, f"disk-{name}", "--save_steps", 1, "--async_save", background)
        todo.append(dict(name=name, argv=command, full_disk=[3, 4]))
    results = jobs(work, "disk", 2, *todo)
    for name in ("sync", "async"):
        assert len(results[name]["steps"]) == 6
        left = sorted(path.name for path in (work / f"disk-{name}").iterdir() if "checkpoint" in path.name)
        if name == "sync":
            assert left == [f"checkpoint-{step}" for step in (1, 2, 5, 6)]
        else:  # which writes were under way is a matter of time
            assert "checkpoint-6" in left and "checkpoint-3" not in left
            assert set(left) < {f"checkpoint-{step}" for step in range(1, 7)}
        for step in left:
            assert json.loads((work / f"disk-{name}" / step / "training_state/state.json").read_text())["step"] == int(step[11:])


def test_nonfinite_is_named(work):
    hot = argv(work, "hot", "--lr", 1e18, "--lr_warmup_iters", 0, "--clip_grad", 0)
    skip = argv(work, "hot-skip", "--lr", 1e18, "--lr_warmup_iters", 0, "--clip_grad", 0, "--on_nonfinite", "skip")
    results = jobs(work, "hot", 2, dict(name="stop", argv=hot, error=True), dict(name="skip", argv=skip))
    text = results["stop"]["error"]
    assert text.startswith("FloatingPointError: train_step: step 2") and "rank 0: forward of micro-batch 0: " in text
    assert "gradients hold NaN or Inf: " in text and "is the first whose output holds NaN or Inf" in text
    bad = [json.loads(line) for line in (work / "hot/bad_batches.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in bad] == [2] and len(bad[0]["rows"]) == 8
    assert all(row["id"] == f"row-{row['row']}" for row in bad[0]["rows"])
    assert (work / "hot/checkpoint-1/training_state/state.json").exists(), "saved before it stopped"
    skipped = [json.loads(line) for line in (work / "hot-skip/bad_batches.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in skipped] == [2, 3, 4, 5, 6] and len(results["skip"]["steps"]) == 1


def test_spikes_are_recorded_skipped_or_end_the_run(work):
    calm = [0.01] * 40  # every loss of this model is far above
    todo = [
        dict(name=name, argv=argv(work, f"spike-{name}", "--on_loss_spike", name, "--save_steps", 1), recent=calm)
        for name in ("warn", "skip", "stop")
    ]
    todo[-1]["error"] = True
    results = jobs(work, "spike", 2, *todo)
    for name, steps in (("warn", 6), ("skip", 6), ("stop", 1)):
        bad = [json.loads(line) for line in (work / f"spike-{name}/bad_batches.jsonl").read_text().splitlines()]
        assert [entry["iteration"] for entry in bad] == list(range(1, steps + 1)) and {len(entry["rows"]) for entry in bad} == {8}
        assert all(entry["reason"] == "spike" and entry["skipped"] == (name == "skip") for entry in bad)
        assert len(list((work / f"spike-{name}").glob("checkpoint-*"))) == (0 if name == "stop" else 6)
    for name in ("warn", "skip"):
        assert results[name]["said"].count("is a spike") == 6
        rows = [[row["row"] for row in entry["rows"]] for entry in bad]
        assert sorted(rows[0]) == [row for _, row in results[name]["steps"][0][3]]
    assert "is a spike" in results["stop"]["error"] and "stop" in results["stop"]["error"]
    start = tiny.stored(work / "model")
    same_bits(
        tiny.stored(work / "spike-skip/checkpoint-6"),
        {name: start[name] for name in tiny.stored(work / "spike-skip/checkpoint-6")},
    )
    assert not torch.equal(tiny.stored(work / "spike-warn/checkpoint-6")["model.norm.weight"], start["model.norm.weight"]), (
        "only a warning"
    )


def test_profile_and_phases(work):
    jobs(work, "profile", 1, dict(name="run", argv=argv(work, "profile", "--profile", "2-3")))
    trace = json.loads((work / "profile/profile/steps-2-3-rank-0.json").read_text())
    assert len(trace["traceEvents"]) > 100
    record = [json.loads(line) for line in (work / "profile/logging.jsonl").read_text().splitlines()][2]
    phases = [record[f"seconds_{name}"] for name in ("forward", "backward", "communication", "optimizer")]
    assert all(value >= 0 for value in phases) and 0.2 * record["step_seconds"] < sum(phases) <= 1.05 * record["step_seconds"]
    assert {"iteration", "loss", "grad_norm", "lr", "tokens_per_second", "memory_gib", "data_wait", "skew", "tflops"} <= set(
        record
    )


@pytest.mark.slow
def test_soak(work):
    """2,000 steps with checkpoints in the background, evaluation and streamed data: memory stays flat, nothing leaks."""
    command = argv(
        work, "soak", "--save_steps", 50, "--async_save", "true", "--save_total_limit", 2, "--val_dataset", work / "plain.txt", "--eval_steps", 100,
        "--streaming", "true", "--shuffle_buffer_size", 16, "--report_to", "tensorboard", steps=2000,
    )  # fmt: skip
    command[command.index("--lr") + 1] = "1e-3"
    resources = jobs(work, "soak", 2, dict(name="run", argv=command, soak=True))["run"]["resources"]
    assert len(resources) == 20
    early, late = resources[4], resources[-1]
    print(resources)
    assert late[0] - early[0] < 5, f"resident memory grew from {early[0]:.0f} to {late[0]:.0f} MiB"
    assert late[1] <= early[1] + 1 and late[2] <= early[2] + 1, "files or threads"
