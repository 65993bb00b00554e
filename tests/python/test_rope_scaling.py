"""RoPE frequencies of every scaling kind against Transformers' own functions."""

import json

import mcore_bridge as mb
import pytest
import tiny
import torch
from mcore_bridge.engine import _core
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_SHAPE = dict(
    vocab_size=101,
    hidden_size=512,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=4096,
)
_LIST = [1.0 + 0.25 * i for i in range(32)]

KINDS = {
    "linear": dict(rope_type="linear", factor=3.0),
    "dynamic": dict(rope_type="dynamic", factor=2.5),
    "llama3": dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024),
    "yarn_no_truncate": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024, truncate=False),
    "yarn_betas": dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=1024, beta_fast=16, beta_slow=2),
    "yarn_mscale": dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=1024, mscale=1.5, mscale_all_dim=0.7),
    "yarn_attention_factor": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024, attention_factor=0.9),
    "yarn_small_factor": dict(rope_type="yarn", factor=1.0, original_max_position_embeddings=4096),
    "longrope": dict(
        rope_type="longrope",
        short_factor=_LIST,
        long_factor=[3 * x for x in _LIST],
        original_max_position_embeddings=1024,
    ),
    "longrope_factor": dict(
        rope_type="longrope",
        short_factor=_LIST,
        long_factor=_LIST[::-1],
        factor=16.0,
        original_max_position_embeddings=1024,
    ),
}
if tiny.TRANSFORMERS_4:
    del KINDS["longrope_factor"]  # Transformers 4 ignores the factor once the original length is known; we do as 5 does


def llama(**fields):
    return AutoConfig.for_model("llama", **tiny.in_this_version({**_SHAPE, **fields}))


def ours(config, length):
    fields = mb.hf_to_mcore_config(json.loads(config.to_json_string(use_diff=False)))
    return _core.rope_frequencies(mb.ModelConfig(**fields).engine, length)


def compare(actual, expected):
    frequencies, scaling = actual
    torch.testing.assert_close(torch.tensor(frequencies), expected[0], rtol=2e-6, atol=0)
    assert scaling == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("length", [16, 1024, 1025, 4096, 9000])
@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, theta, length):
    config = llama(rope_parameters=dict(KINDS[kind], rope_theta=theta))
    compute = ROPE_INIT_FUNCTIONS[KINDS[kind]["rope_type"]]
    compare(ours(config, length), compute(config, torch.device("cpu"), seq_len=length))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_unscaled(family):
    from transformers import AutoModel

    rope = dict(rope_type="default", rope_theta=12345.0)
    config = AutoConfig.for_model(family, **tiny.in_this_version(dict(_SHAPE, rope_parameters=rope)))
    rope = AutoModel.from_config(config).rotary_emb
    compare(ours(config, 7), (rope.inv_freq, rope.attention_scaling))


def test_alpha():
    """Dynamic scaling with a fixed alpha, which Transformers lacks: base * alpha^(d / (d - 2))."""
    config = AutoConfig.for_model("llama", **_SHAPE)
    fields = mb.hf_to_mcore_config(config.to_dict())
    fields["rope_scaling"] = dict(type="dynamic", alpha=1000.0)
    frequencies, scaling = _core.rope_frequencies(mb.ModelConfig(**fields).engine, 99999)
    expected = 1.0 / (10000.0 * 1000.0 ** (64 / 62)) ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(torch.tensor(frequencies), expected, rtol=2e-6, atol=0)
    assert scaling == 1
