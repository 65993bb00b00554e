"""What the layers say they keep for backward (Module::footprint) is what autograd saves."""

import sys
from pathlib import Path

import mcore_bridge as mb
import pytest
import tiny
import torch
from mcore_bridge.engine import _core
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from plan_memory import kept_bytes  # noqa: E402

BATCH, LENGTH = 2, 48

BASE = dict(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=16,
    padded_vocab_size=tiny.VOCAB,
    hf_model_type="llama",
)
LORA = dict(r=4)
BF16 = dict(params_dtype="bfloat16")
# Experts of equal loads. The first layer has none where `moe_layer_freq` says so.
MOE = dict(
    hf_model_type="qwen3_moe",
    num_moe_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=48,
    moe_router_force_load_balancing=True,
)
SHARED = dict(MOE, hf_model_type="qwen2_moe", moe_shared_expert_intermediate_size=40)
GATED = dict(SHARED, moe_shared_expert_gate=True)
SIGMOID = dict(
    MOE,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_topk_scaling_factor=2.5,
    moe_layer_freq=[0, 1, 1],
)
CASES = {
    "fp32": ({}, None),
    "bf16": (dict(params_dtype="bfloat16"), None),
    "tied": (dict(untie_embeddings_and_output_weights=False), None),
    "biases": (dict(add_bias_linear=True), None),
    "qk_norm": (dict(qk_layernorm=True), None),
    "qk_norm_bf16": (dict(qk_layernorm=True, params_dtype="bfloat16"), None),
    "one_group": (dict(num_query_groups=1), None),
    "all_groups": (dict(num_query_groups=8), None),
    "no_rope": (dict(position_embedding_type="none"), None),
    "no_rope_one_group": (dict(position_embedding_type="none", num_query_groups=1), None),
    "no_rope_all_groups": (dict(position_embedding_type="none", num_query_groups=8), None),
    "partial_rope": (dict(rotary_percent=0.5), None),
    "hidden_dropout": (dict(hidden_dropout=0.1), None),
    "attention_dropout": (dict(attention_dropout=0.1), None),
    "attention_dropout_bf16": (dict(attention_dropout=0.1, qk_layernorm=True, params_dtype="bfloat16"), None),
    "attention_dropout_all_groups": (dict(attention_dropout=0.1, num_query_groups=8, qk_layernorm=True), None),
    "attention_dropout_views": (
        dict(attention_dropout=0.1, num_query_groups=8, position_embedding_type="none"),
        None,
    ),
    "attention_dropout_recompute": (dict(attention_dropout=0.1, recompute_granularity="selective"), None),
    "window": (dict(window_size=[7, 0]), None),
    "offload": (dict(cpu_offloading=True, cpu_offloading_num_layers=2), None),
    "offload_qk_norm": (dict(cpu_offloading=True, cpu_offloading_num_layers=3, qk_layernorm=True), None),
    "offload_views": (dict(cpu_offloading=True, cpu_offloading_num_layers=1, position_embedding_type="none"), None),
    "offload_mlp": (
        dict(cpu_offloading=True, cpu_offloading_num_layers=2, recompute_granularity="selective", recompute_modules=["mlp"]),
        None,
    ),
    "offload_lora": (dict(cpu_offloading=True, cpu_offloading_num_layers=2), dict(r=4, lora_dropout=0.1)),
    "recompute": (dict(recompute_granularity="full"), None),
    "recompute_units": (dict(recompute_granularity="full", recompute_num_layers=2), None),
    "recompute_block": (dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1), None),
    "lora": ({}, LORA),
    "lora_bf16": (dict(params_dtype="bfloat16"), LORA),
    "lora_qk_norm": (dict(qk_layernorm=True, params_dtype="bfloat16"), LORA),
    "lora_dropout": ({}, dict(r=4, lora_dropout=0.1)),
    "lora_parts": ({}, dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"])),
    "lora_mlp": ({}, dict(r=4, target_modules=["linear_fc1"])),
    "lora_saves_embedding": ({}, dict(r=4, modules_to_save=["embed_tokens", "lm_head"])),
    "fp8": (dict(fp8="hybrid", params_dtype="bfloat16"), None),
    "fp8_lora": (dict(fp8="e4m3", fp8_recipe="tensorwise"), LORA),
    "lora_recompute": (dict(recompute_granularity="full"), LORA),
    "offload_moe": (dict(MOE, cpu_offloading=True, cpu_offloading_num_layers=2), None),
    "offload_moe_gate": (dict(GATED, cpu_offloading=True, cpu_offloading_num_layers=3, **BF16), None),
    "offload_moe_lora": (dict(GATED, cpu_offloading=True, cpu_offloading_num_layers=2), LORA),
    "moe": (MOE, None),
    "moe_bf16": ({**MOE, **BF16}, None),
    "moe_qk_norm": (dict(MOE, qk_layernorm=True), None),
    "moe_pre_softmax": (dict(MOE, moe_router_pre_softmax=True, moe_router_dtype=None, **BF16), None),
    "moe_fp32_router": (dict(SIGMOID, moe_router_weight_in_fp32=True, **BF16), None),
    "moe_fp32_router_without_dtype": (dict(MOE, moe_router_weight_in_fp32=True, moe_router_dtype=None, **BF16), None),
    "moe_fp64": (dict(MOE, moe_router_dtype="fp64"), None),
    "moe_sigmoid": ({**SIGMOID, **BF16}, None),
    "moe_norm_min": (dict(MOE, moe_router_norm_min=1e-3), None),
    "moe_losses": (
        dict(
            SIGMOID,
            moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
            moe_aux_loss_coeff=[1e-2, 1e-2, 1e-2],
            moe_z_loss_coeff=1e-3,
        ),
        None,
    ),
    "moe_sinkhorn": (dict(MOE, moe_router_load_balancing_type=["sinkhorn"]), None),
    "moe_capacity": (dict(MOE, moe_expert_capacity_factor=1.5), None),
    "moe_padded": (dict(MOE, moe_expert_capacity_factor=1.5, moe_pad_expert_input_to_capacity=True), None),
    "moe_on_input": (dict(MOE, moe_apply_probs_on_input=True), None),
    "moe_on_input_bf16": (dict(MOE, moe_apply_probs_on_input=True, **BF16), None),
    "moe_allgather": (dict(MOE, moe_token_dispatcher_type="allgather"), None),
    "moe_shared": (SHARED, None),
    "moe_shared_gate": ({**GATED, **BF16}, None),
    "moe_biases": (dict(MOE, hf_model_type="gpt_oss", add_bias_linear=True), None),
    "moe_sinks": (dict(MOE, hf_model_type="gpt_oss", softmax_type="learnable", **BF16), None),
    "moe_whole_norm": (dict(MOE, hf_model_type="olmoe", qk_layernorm=True, qk_layernorm_whole=True, **BF16), None),
    "moe_clip": (dict(MOE, hf_model_type="olmoe", qk_layernorm=True, qk_layernorm_whole=True, clip_qkv=1.0), None),
    "moe_selective": (dict(MOE, recompute_granularity="selective", recompute_modules=["moe"]), None),
    "moe_recompute": (dict(MOE, recompute_granularity="full"), None),
    "moe_lora": (MOE, LORA),
    "moe_lora_bf16": ({**GATED, **BF16}, LORA),
    "moe_lora_dropout": (MOE, dict(r=4, lora_dropout=0.1)),
    "moe_lora_attention": ({**GATED, **BF16}, dict(r=4, target_modules=["q_proj", "v_proj"])),
    "moe_lora_experts": (MOE, dict(r=4, target_modules=["up_proj", "down_proj"])),
    "moe_lora_selective": (dict(GATED, recompute_granularity="selective", recompute_modules=["moe"]), LORA),
}


def batch(lengths=None):
    """A micro-batch, or one packed row of documents of these lengths."""
    ids, labels = tiny.rows(1 if lengths else BATCH, sum(lengths) if lengths else LENGTH)
    ids = ids.clone()  # one row of a longer one would keep that
    packed = mb.PackedSeqParams(torch.tensor([0, *lengths]).cumsum(0).int()) if lengths else None
    return dict(input_ids=ids, labels=labels, packed_seq_params=packed)


def build(fields, lora=None):
    config = mb.ModelConfig(**{**BASE, **fields})
    models = mb.get_mcore_model(config, device="cpu")
    config.bridge.initialize(models, seed=1)
    if lora:
        mb.add_lora(models, mb.LoraOptions(**lora))
    return models[0]


@pytest.mark.parametrize("name", CASES)
def test_saved_bytes(name):
    model = build(*CASES[name])
    kept, offloaded = kept_bytes(model, batch())
    if name in ("recompute", "recompute_units", "lora_recompute", "moe_recompute"):
        # cos and sin, which recomputed layers hold without autograd's knowledge.
        kept += 2 * BATCH * LENGTH * BASE["kv_channels"] // 2 * 4
    segments = _core.segments(model.engine, BATCH, LENGTH, training_loss=False)
    assert sum(segment["saved"] for segment in segments) == kept, segments
    assert sum(segment["offloaded"] for segment in segments) == offloaded, segments
    assert (offloaded > 0) == name.startswith("offload")


@pytest.mark.parametrize("fields", [{}, dict(attention_dropout=0.1), dict(window_size=[7, 0])], ids=str)
def test_saved_bytes_of_packed_rows(fields):
    model = build(fields)
    segments = _core.segments(model.engine, 1, 60, documents=3, training_loss=False)
    assert sum(segment["saved"] for segment in segments) == kept_bytes(model, batch([20, 20, 20]))[0]


def test_planned_fp8_weights():
    """One byte each way round for every number of a quantised matrix, except where weights come and go."""
    fields = {**BASE, "params_dtype": "bfloat16"}
    request = dict(processes=1, micro_batch_size=1, global_batch_size=1, sequence_length=32)

    def weights(**more):
        return mb.plan_layout(mb.ModelConfig(**fields, **more), **request)["stages"][0]["memory"]["weights"]

    model = build(dict(params_dtype="bfloat16"))
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".linear_" in name and p.dim() == 2)
    assert weights(fp8="hybrid") - weights() == 2 * matrices
    layer = matrices // BASE["num_layers"]
    assert weights(fp8="hybrid", first_last_layers_bf16=True) - weights() == 2 * layer


class Products(TorchDispatchMode):
    """FLOPs of the matrix products that run inside, attention's excepted."""

    def __init__(self):
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = args[0 if name == "aten::mm" else 1 :][:2]
            self.flops += 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


FULL = dict(recompute_granularity="full")
# B's of fused layers are counted without the zeros they are multiplied with; attention's backward runs in every layer.
DOWN = dict(r=4, target_modules=["down_proj"], modules_to_save=["embed_tokens"])
AGAIN = {
    "full": (FULL, None),
    "units": (dict(FULL, recompute_num_layers=2), None),
    "block": (dict(FULL, recompute_method="block", recompute_num_layers=2), None),
    "selective": (dict(recompute_granularity="selective", recompute_modules=["mlp"]), None),
    "biases": (dict(FULL, add_bias_linear=True), None),
    "lora": (FULL, DOWN),
    "lora_selective": (dict(recompute_granularity="selective", recompute_modules=["mlp"]), DOWN),
    "fp8": (dict(FULL, fp8="hybrid", **BF16), None),
    "experts": (dict(SHARED, **FULL), None),
    "experts_between": (dict(MOE, moe_layer_freq=[0, 1, 0], **FULL), None),
    "experts_selective": (dict(SHARED, recompute_granularity="selective", recompute_modules=["moe"]), None),
}


@pytest.mark.parametrize("name", AGAIN)
def test_flops_that_run_again(name):
    """What recomputation adds to backward, less than a forward where the last product is left out."""
    fields, lora = AGAIN[name]
    plain = {key: value for key, value in fields.items() if not key.startswith("recompute")}
    planned, ran = [], []
    for some in (plain, fields):
        model = build(some, lora)
        segments = _core.segments(model.engine, BATCH, LENGTH)
        planned.append(sum(segment["backward_flops"] for segment in segments))
        given = batch()
        with Products() as products:
            loss = model(**given).sum()
            forward = products.flops
            loss.backward()
        ran.append(products.flops - forward)
    attention = 0  # of the layers that run it again; its products are not counted
    if fields["recompute_granularity"] == "full":
        layers = fields.get("recompute_num_layers", 2) if fields.get("recompute_method") == "block" else BASE["num_layers"]
        attention = layers * 4 * BATCH * LENGTH * (LENGTH + 1) / 2 * BASE["num_attention_heads"] * BASE["kv_channels"]
    assert ran[1] > ran[0]
    assert planned[1] - planned[0] - attention == ran[1] - ran[0]
