"""config.json as Transformers understands it: whatever a file leaves out means the same to both sides."""

import copy

import mcore_bridge as mb
import pytest
import tiny
import torch
from mcore_bridge.engine import _core
from transformers import AutoConfig, AutoModelForCausalLM

_SHAPE = dict(vocab_size=101, hidden_size=2048, intermediate_size=96, num_hidden_layers=30, num_attention_heads=32)

FILES = {
    "sparse": {},
    "no window": dict(sliding_window=None),
    "window on": dict(use_sliding_window=True, sliding_window=77),
    "window from layer 3": dict(use_sliding_window=True, sliding_window=77, max_window_layers=3),
    "layer types": dict(use_sliding_window=True, sliding_window=77, layer_types=["sliding_attention", "full_attention"] * 15),
    "few heads": dict(num_key_value_heads=4, head_dim=48, tie_word_embeddings=True),
    "old rope": dict(rope_theta=500000.0, rope_scaling=dict(type="linear", factor=2.0), max_position_embeddings=512),
    "new rope": dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=4.0)),
    "both ropes": dict(
        rope_theta=1e6,
        rope_scaling=dict(rope_type="yarn", factor=4.0),
        rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=4.0),
    ),
    "epsilon": dict(rms_norm_eps=3e-5, attention_dropout=0.1, hidden_act="gelu_pytorch_tanh", initializer_range=0.01),
}


def windows(family, hf):
    """Tokens each layer's attention reaches back over, the own one included; None: all."""
    if family == "llama":
        return [None] * hf.num_hidden_layers
    if family == "mistral":
        return [hf.sliding_window] * hf.num_hidden_layers
    return [hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types]


def rope_of(hf):
    if tiny.TRANSFORMERS_4:
        scaling = getattr(hf, "rope_scaling", None) or {}  # Mistral's class there has no such field
        return {"rope_type": scaling.get("type", "default"), **scaling, "rope_theta": hf.rope_theta}
    return hf.rope_parameters


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_same_meaning(family, file):
    values = {"model_type": family, **_SHAPE, **FILES[file]}
    hf = AutoConfig.for_model(**tiny.in_this_version(copy.deepcopy(values)))  # it writes into the dictionaries it is given
    ours = mb.ModelConfig(**mb.hf_to_mcore_config(values))
    assert ours.layernorm_epsilon == hf.rms_norm_eps
    assert ours.num_query_groups == hf.num_key_value_heads
    assert ours.kv_channels == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    assert ours.max_position_embeddings == hf.max_position_embeddings
    assert ours.untie_embeddings_and_output_weights == (not hf.tie_word_embeddings)
    assert ours.attention_dropout == hf.attention_dropout
    assert ours.init_method_std == hf.initializer_range
    assert ours.hidden_act == {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[hf.hidden_act]
    rope = rope_of(hf)
    assert ours.rotary_base == rope["rope_theta"]
    assert (ours.rope_scaling or {"rope_type": "default"})["rope_type"] == rope["rope_type"]
    assert (ours.rope_scaling or {}).get("factor") == rope.get("factor")
    flags = ours.window_attn_skip_freq or [1] * 30
    left = ours.window_size[0] + 1 if ours.window_size else None
    assert [left if flag else None for flag in flags] == windows(family, hf)


def test_parameters_are_those_of_the_model():
    """Names and biases of each family's state dict, with every flag the family knows switched on."""
    small = dict(_SHAPE, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    for family in ("llama", "qwen2", "qwen3", "mistral"):
        for flags in ({}, dict(attention_bias=True, mlp_bias=True)):
            values = {"model_type": family, **small, **flags}
            with torch.device("meta"):
                expected = set(AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).state_dict())
            config = mb.ModelConfig(**mb.hf_to_mcore_config(values))
            assert set(_core.hf_names(config.engine)) == expected, (family, flags)
