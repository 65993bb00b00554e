"""Tiny random Transformers models, with every parameter randomised and sizes that differ wherever the family allows it."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

TRANSFORMERS_4 = transformers.__version__.startswith("4.")

VOCAB = 101  # prime: never divides by a tensor-parallel size

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=12,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

FAMILIES = {
    "llama": ("llama", {}),
    "llama3_biases_tied": ("llama", dict(rope_parameters=_LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama_linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
    "llama_dynamic": (
        "llama",
        dict(max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)),
    ),
    "qwen2": ("qwen2", {}),
    "qwen2_yarn_window": (
        "qwen2",
        dict(rope_parameters=_YARN, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_tied": ("qwen3", dict(tie_word_embeddings=True, attention_bias=True)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral_window": ("mistral", dict(sliding_window=5)),
}

_EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40)

_SIGMOID = dict(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=40,
    n_shared_experts=2,
    first_k_dense_replace=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
_HALF = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)

# Mixtures of experts. Layers without experts and every peculiarity of a family occur.
MOE_FAMILIES = {
    "qwen3_moe": ("qwen3_moe", dict(_EXPERTS, norm_topk_prob=True, mlp_only_layers=[1])),
    "qwen2_moe": ("qwen2_moe", dict(_EXPERTS, shared_expert_intermediate_size=56, decoder_sparse_step=2)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=9)),
    "olmoe": ("olmoe", dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, clip_qkv=1.5)),
    "dots1": (
        "dots1",
        dict(_SIGMOID, n_group=4, topk_group=2, sliding_window=6, layer_types=["full_attention", "sliding_attention"] * 2),
    ),
    "glm4_moe": (
        "glm4_moe",
        dict(_SIGMOID, n_group=2, topk_group=1, use_qk_norm=True, attention_bias=True, rope_parameters=_HALF),
    ),
    "glm4_moe_air": ("glm4_moe", dict(_SIGMOID, use_qk_norm=False, rope_parameters=_HALF)),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        dict(
            moe_num_experts=8, moe_k=3, moe_intermediate_size=40, moe_num_shared_experts=2, moe_layer_end_index=2, use_bias=False
        ),
    ),
    "minimax_m2": (
        "minimax_m2",
        dict(num_local_experts=8, num_experts_per_tok=3, rope_parameters=dict(_HALF, rope_theta=5e6)),
    ),
    "gpt_oss": (
        "gpt_oss",
        dict(
            num_local_experts=8,
            num_experts_per_tok=3,
            sliding_window=6,
            swiglu_limit=0.5,
            rope_parameters=dict(_YARN, truncate=False),
        ),
    ),
    "hy_v3": (
        "hy_v3",
        dict(
            _EXPERTS,
            num_shared_experts=2,
            router_scaling_factor=1.7,
            mlp_layer_types=["dense", "sparse", "sparse", "dense"],
            enable_moe_fp32_combine=False,
        ),
    ),
    "llama4": (
        "llama4_text",
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            intermediate_size_mlp=72,
            interleave_moe_layer_step=2,
            attention_chunk_size=8,
            floor_scale=4,
            attn_scale=0.3,
            no_rope_layer_interval=2,
        ),
    ),
}
# Older versions of Transformers know not all of them, and clamp gpt_oss's activation at 7 whatever the config says.
MOE_FAMILIES = {name: family for name, family in MOE_FAMILIES.items() if family[0] in CONFIG_MAPPING}
if not hasattr(AutoConfig.for_model("gpt_oss"), "swiglu_limit"):
    MOE_FAMILIES["gpt_oss"][1].pop("swiglu_limit")
ALL_FAMILIES = {**FAMILIES, **MOE_FAMILIES}


def in_this_version(fields):
    """Config fields with RoPE named as the installed Transformers names it."""
    if not TRANSFORMERS_4 or "rope_parameters" not in fields:
        return fields
    fields = dict(fields)
    rope = dict(fields.pop("rope_parameters"))
    fields["rope_theta"] = rope.pop("rope_theta", 10000.0)
    if rope.get("rope_type") == "longrope":
        fields["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    return fields if rope.get("rope_type", "default") == "default" else {**fields, "rope_scaling": rope}


def build(name, **overrides):
    """A random float32 model of one of ALL_FAMILIES."""
    model_type, changes = ALL_FAMILIES[name]
    fields = {**_COMMON, **changes, **overrides}
    if model_type in ("qwen2", "qwen2_moe", "olmoe", "ernie4_5_moe"):
        fields.pop("head_dim")  # derived there
        fields["hidden_size"] = 96
    config = AutoConfig.for_model(model_type, **in_this_version(fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.08 + (1.0 if parameter.dim() == 1 else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    return model.eval()


def save(name, folder, max_shard_size="60KB", **overrides):
    """Writes the model as Hugging Face files (several shards) and returns it."""
    model = build(name, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def stored(folder):
    """{name: tensor} of all safetensors files in a folder."""
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def save_adapter(config, models, folder, base):
    """adapter_model.safetensors and adapter_config.json, as PEFT opens them."""
    content = config.bridge.peft_adapter_config(models, "default", str(base))
    config.bridge.save_weights(
        models, folder, peft_format=True, extra_files={"adapter_config.json": json.dumps(content).encode()}
    )


def on_disk(model, values, folder):
    """{name in Transformers' files: tensor} of one value per parameter of the model, through Transformers' own conversion."""
    other = deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(values[name])
    other.save_pretrained(folder)
    return stored(folder)


def rows(batch, length, seed=0):
    """input_ids and labels aligned with them (labels[t] is the target of position t, some without loss)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (batch, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    return tokens[:, :-1].contiguous(), labels.contiguous()


def refused(words, work):
    """`work` raises a ValueError that says all of `words`."""
    with pytest.raises(ValueError) as error:
        work()
    for word in words:
        assert word in str(error.value)


def relative(actual, expected):
    """|actual - expected| / |expected| in the Frobenius norm; NaN never passes a comparison."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()
