"""mcore-bridge plan, the estimate at the start of training, layouts refused before anything is built."""

import json
import time
from types import SimpleNamespace

import mcore_bridge as mb
import pytest
from mcore_bridge.cli import estimate
from mcore_bridge.cli.arguments import PlanArguments, parse
from mcore_bridge.cli.main import main
from mcore_bridge.cli.plan import flags_of, make_plans

LLAMA = dict(
    model_type="llama",
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
)
SMALL = {
    **LLAMA,
    **dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16, vocab_size=32000),
}
# Qwen3-235B-A22B
QWEN = dict(
    model_type="qwen3_moe",
    hidden_size=4096,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=94,
    num_attention_heads=64,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    vocab_size=151936,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
)
SMALL_QWEN = {
    **QWEN,
    **dict(hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_experts=16, moe_intermediate_size=512),
    **dict(vocab_size=32000),
}


def write(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def test_command_reads_config_json_alone(tmp_path, capsys):
    folder = write(tmp_path, LLAMA)
    words = ["--gpus", "1024", "--global_batch_size", "1024", "--max_length", "8192", "--use_distributed_optimizer", "true"]
    assert main(["plan", "--model", folder, *words, "--explain", "true"]) == 0
    text = capsys.readouterr().out
    assert "flags of the best: --tensor_model_parallel_size" in text
    for word in ("weights:", "optimizer:", "communication tp:", "bubble:", "step:", "estimates"):
        assert word in text, word
    assert main(["plan", "--model", folder + "/config.json", *words, "--json", "true", "--top", "2"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert len(plans) == 2 and all(plan["fits"] for plan in plans)
    memory = plans[0]["stages"][plans[0]["worst_stage"]]["memory"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")


def test_a_mixture_of_experts_on_1024_gpus(tmp_path, capsys):
    folder = write(tmp_path, QWEN)
    words = ["--gpus", "1024", "--gpu_memory", "80GiB", "--global_batch_size", "1024", "--max_length", "8192"]
    start = time.process_time()
    assert main(["plan", "--model", folder, *words, "--explain", "true"]) == 0
    assert time.process_time() - start < 60
    text = capsys.readouterr().out
    for word in ("EP ", "--expert_model_parallel_size", "experts: ", "of an even load", "communication ep:", "expert parallel:"):
        assert word in text, word
    arguments = parse(PlanArguments, "plan", ["--model", folder, *words, "--top", "20"])
    _, plans = make_plans(arguments)
    for plan in plans:
        layout = plan["layout"]
        assert layout["sequence_parallel"] == (layout["tensor_model_parallel_size"] > 1)
        # 22 billion of the parameters work for a token: 6 FLOPs each, and causal attention.
        attention = 6 * 94 * 8192 * 8192
        assert plan["model_flops"] / (1024 * 8192) == pytest.approx(6 * 21.6e9 + attention, rel=0.02)


def test_parameters_of_a_mixture_of_experts(tmp_path):
    """Whatever the layout: 235 billion."""
    folder = write(tmp_path, QWEN)
    for tensor, pipeline, expert in ((1, 2, 8), (4, 1, 32), (2, 2, 128)):
        words = f"--gpus 256 --global_batch_size 256 --max_length 4096 --tensor_model_parallel_size {tensor}".split()
        words += (
            f"--pipeline_model_parallel_size {pipeline} --expert_model_parallel_size {expert} --context_parallel_size 1".split()
        )
        _, plans = make_plans(
            parse(PlanArguments, "plan", ["--model", folder, *words, "--virtual_pipeline_model_parallel_size", "1"])
        )
        experts = 94 * 3 * 128 * 4096 * 1536
        held = sum(stage["parameters"] for stage in plans[0]["stages"])
        # Router and norms are whole on every tensor rank, keys and values as often as there are groups.
        assert (held - experts / expert) * tensor == pytest.approx(235.094e9 - experts, rel=0.02)


def test_given_sizes_stay(tmp_path):
    folder = write(tmp_path, SMALL)
    words = "--gpus 16 --tensor_model_parallel_size 4 --micro_batch_size 2 --recompute_granularity full --max_length 1024"
    _, plans = make_plans(parse(PlanArguments, "plan", ["--model", folder, *words.split(), "--top", "100"]))
    for plan in plans:
        layout = plan["layout"]
        assert layout["tensor_model_parallel_size"] == 4 and layout["micro_batch_size"] == 2
        assert layout["recompute_granularity"] == "full" and "--tensor_model_parallel_size 4" in flags_of(plan)


def test_lora_needs_less(tmp_path):
    folder = write(tmp_path, SMALL)

    def total(*words):
        _, plans = make_plans(parse(PlanArguments, "plan", ["--model", folder, "--gpus", "1", "--max_length", "1024", *words]))
        return plans[0]["stages"][0]["memory"]

    full, lora = total(), total("--tuner_type", "lora", "--lora_rank", "8")
    # On a GPU 64 bf16 numbers of room for B behind each row of the three matrices in front of which x is made.
    heads = SMALL["num_attention_heads"] + 2 * SMALL["num_key_value_heads"]
    rows = heads * SMALL["hidden_size"] // SMALL["num_attention_heads"] + 2 * SMALL["intermediate_size"] + SMALL["hidden_size"]
    room = SMALL["num_hidden_layers"] * rows * 64 * 2
    assert full["weights"] + room < lora["weights"] < 1.02 * full["weights"] + room
    assert lora["gradients"] < 0.02 * full["gradients"] and lora["optimizer"] == 3 * lora["gradients"]


@pytest.mark.parametrize(
    "words, text",
    [
        (["--gpus", "0"], "how many GPUs"),
        (["--gpus", "8", "--tensor_model_parallel_size", "3"], "nearest layout that works: tensor_model_parallel_size"),
        (["--gpus", "8", "--hardware", "abacus"], "not in the table"),
        (["--gpus", "8", "--global_batch_size", "9", "--micro_batch_size", "2"], "no layout of 8 GPUs works"),
        (["--gpus", "8", "--gpu_memory", "much"], "not a size"),
    ],
)
def test_bad_requests(tmp_path, capsys, words, text):
    assert main(["plan", "--model", write(tmp_path, SMALL), *words]) == 1
    assert text in capsys.readouterr().err


def test_what_does_not_fit_says_so(tmp_path, capsys):
    assert main(["plan", "--model", write(tmp_path, LLAMA), "--gpus", "8", "--gpu_memory", "80GiB", "--max_length", "4096"]) == 1
    text = capsys.readouterr().out
    assert "too big" in text and "No layout fits" in text


def test_architectures_the_engine_cannot_build_are_refused(tmp_path, capsys):
    assert main(["plan", "--model", write(tmp_path, {**SMALL, "model_type": "deepseek_v3"}), "--gpus", "8"]) == 1
    assert "deepseek_v3" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path / "nowhere" / "config.json"), "--gpus", "8"]) == 1


def test_check_layout_names_the_nearest():
    fields = {**mb.hf_to_mcore_config(SMALL), "tensor_model_parallel_size": 2}
    mb.check_layout(fields, processes=4, micro_batch_size=2, global_batch_size=8)
    with pytest.raises(ValueError, match="global_batch_size 10 .*the nearest layout that works: global_batch_size 12"):
        mb.check_layout(fields, processes=4, micro_batch_size=2, global_batch_size=10)
    with pytest.raises(ValueError, match="6 processes.*the nearest layout that works: tensor_model_parallel_size 2"):
        mb.check_layout({**fields, "tensor_model_parallel_size": 4}, processes=6)
    with pytest.raises(ValueError, match="hidden_size"):
        mb.check_layout({**fields, "hidden_size": 0})


def arguments(**changes):
    values = vars(parse(PlanArguments, "plan", []))
    return SimpleNamespace(**{**values, "micro_batch_size": 1, "global_batch_size": 8, **changes})


@pytest.mark.parametrize("model", [SMALL, SMALL_QWEN], ids=["dense", "experts"])
@pytest.mark.parametrize("memory, outcome", [(2**40, "fits"), (4 * 2**30, "warns"), (2**28, "fails")])
def test_estimate_at_the_start(monkeypatch, model, memory, outcome):
    monkeypatch.setattr(estimate, "device_memory", lambda: memory)
    config = mb.ModelConfig(**{**mb.hf_to_mcore_config(model), "params_dtype": "bfloat16"})
    said, warned = [], []
    logger = mb.get_logger()
    monkeypatch.setattr(logger, "info", said.append)
    monkeypatch.setattr(logger, "warning", warned.append)

    def check():
        return estimate.check_memory(arguments(max_length=4096), config, 8)

    if outcome == "fails":
        with pytest.raises(ValueError, match="weights of one rank alone"):
            check()
    else:
        check()
    assert len(said) == 1 and "memory per rank, estimated: weights" in said[0]
    assert bool(warned) == (outcome == "warns")
    if warned:
        assert "nearest layout that fits: --" in warned[0]
