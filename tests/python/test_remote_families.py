"""Families whose model code is on the hub only, against Transformers models of the same mathematics with weights renamed."""

import json

import mcore_bridge as mb
import pytest
import tiny
import torch
from safetensors.torch import save_file

LOGITS, GRADIENTS = 2e-5, 1e-4


def rewrite(source, target, config, rename):
    target.mkdir()
    tensors = rename(tiny.stored(source))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**json.loads((source / "config.json").read_text()), **config}))


def bailing(source, target):
    def rename(tensors):
        result = {}
        for name, tensor in tensors.items():
            if ".q_proj." in name:
                parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                result[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
            elif not any(part in name for part in (".k_proj.", ".v_proj.")):
                for old, new in (
                    ("embed_tokens", "word_embeddings"),
                    ("self_attn.o_proj", "attention.dense"),
                    ("self_attn.q_norm", "attention.query_layernorm"),
                    ("self_attn.k_norm", "attention.key_layernorm"),
                    ("gate.e_score_correction_bias", "gate.expert_bias"),
                ):
                    name = name.replace(old, new)
                result[name] = tensor
        return result

    config = dict(
        model_type="bailing_moe",
        num_experts=8,
        num_shared_experts=2,
        score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        use_qkv_bias=False,
        use_bias=False,
        rope_theta=10000.0,
        partial_rotary_factor=0.5,
    )
    rewrite(source, target, config, rename)


def deepseek(source, target):
    """ERNIE turns neighbouring entries of a head, DeepSeek entries half a head apart: the same after reordering rows of q and k.
    Its smallest normalising sum of 1 is no normalisation, its correction bias is zero."""

    def rename(tensors):
        result = {}
        for name, tensor in tensors.items():
            if name.endswith("e_score_correction_bias"):
                continue
            if ".q_proj." in name or ".k_proj." in name:
                heads = tensor.view(-1, 12, tensor.shape[1])
                tensor = torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).reshape(tensor.shape)
            result[name] = tensor
        return result

    config = dict(
        model_type="deepseek",
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        first_k_dense_replace=1,
        norm_topk_prob=False,
        scoring_func="softmax",
    )
    rewrite(source, target, config, rename)


CASES = {
    "bailing_moe": (bailing, "glm4_moe", dict(attention_bias=False)),
    "deepseek": (deepseek, "ernie4_5_moe", dict(moe_norm_min=1.0, moe_layer_end_index=3, head_dim=12)),
}


@pytest.mark.parametrize("family", CASES)
def test_equals_its_twin(family, tmp_path):
    convert, twin, overrides = CASES[family]
    hf_model = tiny.build(twin, **overrides)
    if family == "deepseek":
        with torch.no_grad():
            for name, buffer in hf_model.state_dict().items():
                if name.endswith("e_score_correction_bias"):
                    buffer.zero_()
    hf_model.save_pretrained(tmp_path / "twin")
    convert(tmp_path / "twin", tmp_path / "model")
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(tmp_path / "model")))
    (model,) = mb.get_mcore_model(config)
    config.bridge.load_weights([model], tmp_path / "model")
    ids, labels = tiny.rows(2, 24)
    expected = hf_model(ids).logits
    assert tiny.relative(model(ids, None), expected) < LOGITS
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    model(ids, None, labels=labels).sum().backward()
    # Norms and routers are called and kept alike on both sides.
    for i in range(4):
        twin_layer = hf_model.model.layers[i]
        ours = dict(model.named_parameters())
        name = f"decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight"
        assert tiny.relative(ours[name].grad, twin_layer.input_layernorm.weight.grad) < GRADIENTS
        router = f"decoder.layers.{i}.mlp.router.weight"
        assert (router in ours) == hasattr(twin_layer.mlp, "gate"), i
        if router in ours:
            assert tiny.relative(ours[router].grad, twin_layer.mlp.gate.weight.grad) < GRADIENTS
    config.bridge.save_weights([model], tmp_path / "saved")
    saved, original = tiny.stored(tmp_path / "saved"), tiny.stored(tmp_path / "model")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())
