"""cuda_graph_impl: a recorded micro-batch trains as the one it was recorded from (MCB_TEST_DEVICE=cuda), and what cannot be recorded says so."""

import os
import random

import mcore_bridge as mb
import pytest
import tiny
import torch

DEVICE = os.environ.get("MCB_TEST_DEVICE", "cpu")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU (MCB_TEST_DEVICE=cuda)")


def trainer(folder, fields=None, lora=None, family="qwen3", sizes=None, **options):
    tiny.save(family, folder, **sizes or {})
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)) | (fields or {}))
    models = mb.get_mcore_model(config, device=DEVICE)
    config.bridge.load_weights(models, folder)
    if lora is not None:
        mb.add_lora(models, mb.LoraOptions(r=4, lora_alpha=8, **lora))
    mb.set_random_seed(7)
    return mb.Trainer(models, lr=1e-3, lr_decay_style="constant", train_iters=100, **options)


def micro_batches(step):
    """Two micro-batches a step, of two shapes that take turns, one of them packed."""
    result = []
    for index in range(2):
        if step % 2:
            ids, labels = tiny.rows(1, 24, seed=2 * step + index)
            ends = torch.tensor([0, 10, 24], dtype=torch.int32)
            result.append(dict(input_ids=ids, labels=labels, packed_seq_params=mb.PackedSeqParams(ends)))
        else:
            ids, labels = tiny.rows(2, 16, seed=2 * step + index)
            result.append(dict(input_ids=ids, labels=labels))
    return result


@on_gpu
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-6), ("bfloat16", 2e-3)])
@pytest.mark.parametrize("lora", [None, dict(), dict(lora_dropout=0.2)], ids=["full", "lora", "lora_dropout"])
def test_trains_as_without(dtype, tolerance, lora, tmp_path):
    fields = dict(params_dtype=dtype, hidden_dropout=0.0 if lora is None else 0.1)
    runs = []
    for impl in ("none", "local"):
        one = trainer(tmp_path, fields, lora, cuda_graph_impl=impl, cuda_graph_warmup_steps=2)
        runs.append([one.train_step(micro_batches(step)) for step in range(12)])
        last = one
    for plain, graphed in zip(*runs, strict=True):
        assert abs(graphed.loss / plain.loss - 1) < tolerance
        assert abs(graphed.grad_norm / plain.grad_norm - 1) < 10 * tolerance
    # Each of two shapes comes 6 times as the step's first and as its second micro-batch: four graphs with 2 warm-ups each.
    assert last.cuda_graphs == dict(recorded=4, replayed=24 - 2 * 4)


def packings(steps, micro, tokens, seed=3):
    """`micro` rows a step of up to `tokens` tokens, packed from documents of random lengths."""
    draw = random.Random(seed)
    result = []
    for step in range(steps):
        batch = []
        for index in range(micro):
            size = tokens - draw.randrange(tokens // 20)
            cuts = sorted(draw.sample(range(1, size), draw.randrange(2, 8)))
            ids, labels = tiny.rows(1, size, seed=micro * step + index)
            for end in (*cuts, size):
                labels[0, end - 1] = -100
            packed = mb.PackedSeqParams(torch.tensor([0, *cuts, size], dtype=torch.int32))
            batch.append(dict(input_ids=ids, labels=labels, packed_seq_params=packed))
        result.append(batch)
    return result


@on_gpu
@pytest.mark.parametrize("cudnn", [True, False], ids=["cudnn", "flash"])
@pytest.mark.parametrize("lora", [None, dict()], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen3", "mistral_window"])
def test_random_packings_share_graphs(family, lora, cudnn, tmp_path):
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        sizes = dict(head_dim=16)  # kernels are for multiples of 8
        model = dict(fields=dict(params_dtype="bfloat16"), lora=lora, family=family, sizes=sizes)
        plain = trainer(tmp_path, **model)
        graphed = trainer(tmp_path, **model, cuda_graph_impl="local", cuda_graph_warmup_steps=1)
        for batch in packings(steps=20, micro=2, tokens=300):
            expected, found = plain.train_step(batch), graphed.train_step(batch)
            assert abs(found.loss / expected.loss - 1) < 2e-3
            assert abs(found.grad_norm / expected.grad_norm - 1) < 2e-2
            assert (found.tokens, found.loss_tokens) == (expected.tokens, expected.loss_tokens)
        # 286 to 300 tokens become 288 or 320; 3 to 8 documents and those that fill the row up 8 or 16; at most 512 tokens long. Each shape
        # is one as a step's first micro-batch and another as its second: of those that occur here six come back and one does not.
        assert graphed.cuda_graphs == dict(recorded=6, replayed=40 - 6 - 1)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@on_gpu
def test_float32_packings_are_recorded_one_by_one(tmp_path):
    """No kernel reads on the device where documents of float32 end."""
    graphed = trainer(tmp_path, cuda_graph_impl="local", cuda_graph_warmup_steps=1)
    plain = trainer(tmp_path)
    batches = packings(steps=3, micro=1, tokens=60)
    for batch in [*batches, *batches]:
        assert abs(graphed.train_step(batch).loss / plain.train_step(batch).loss - 1) < 1e-6
    assert graphed.cuda_graphs == dict(recorded=3, replayed=3)


@on_gpu
def test_evaluation_between_replays(tmp_path):
    one = trainer(tmp_path, dict(params_dtype="bfloat16"), cuda_graph_impl="local", cuda_graph_warmup_steps=1)
    other = trainer(tmp_path, dict(params_dtype="bfloat16"))
    for step in (0, 2, 4, 6):
        losses = [each.train_step(micro_batches(step)).loss for each in (one, other)]
        assert abs(losses[0] / losses[1] - 1) < 2e-3
        losses = [each.evaluate(micro_batches(1)) for each in (one, other)]
        assert abs(losses[0] / losses[1] - 1) < 2e-3


@on_gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_trained_fp8_codes_change_where_graphs_read_them(recipe, tmp_path):
    fields = dict(params_dtype="bfloat16", fp8="e4m3", fp8_recipe=recipe, fp8_param=True)
    sizes = dict(hidden_size=256, intermediate_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2)
    one = trainer(tmp_path, fields, sizes=sizes, cuda_graph_impl="local", cuda_graph_warmup_steps=1)
    other = trainer(tmp_path, fields, sizes=sizes)
    seen = [[each.train_step(micro_batches(step % 2)).loss for each in (one, other)] for step in range(12)]
    for graphed, plain in seen:  # another order of sums now and then moves a number to the next FP8 number
        assert abs(graphed - plain) < 1e-2, seen
    assert one.cuda_graphs["replayed"] > 0 and seen[-2][0] < seen[0][0] - 0.05


@pytest.mark.parametrize(
    "fields,options,message",
    [
        ({}, dict(cuda_graph_impl="transformer_engine"), "use local"),
        ({}, dict(cuda_graph_impl="full"), "is not one of none, local"),
        ({}, dict(cuda_graph_warmup_steps=0), "at least 1"),
        ({}, dict(cuda_graph_impl="local", data_parallel_sharding_strategy="optim_grads"), "use optim or no_shard"),
        ({}, dict(cuda_graph_impl="local", overlap_grad_reduce=True), "overlap_grad_reduce"),
        (dict(recompute_granularity="full"), dict(cuda_graph_impl="local"), "recompute_granularity 'full'"),
        (dict(cpu_offloading=True, cpu_offloading_num_layers=1), dict(cuda_graph_impl="local"), "cpu_offloading"),
    ],
)
def test_what_cannot_be_recorded(fields, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, fields, **options)


def test_needs_a_rope_that_does_not_depend_on_the_row(tmp_path):
    with pytest.raises(ValueError, match="rope_scaling depends on the length"):
        trainer(tmp_path, family="llama_dynamic", cuda_graph_impl="local")


@pytest.mark.skipif(DEVICE != "cpu", reason="looks at the error without a GPU")
def test_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="needs a GPU, the model is on cpu"):
        trainer(tmp_path, cuda_graph_impl="local")
