"""Adapters on experts: as PEFT sees them, merged, frozen base."""

import warnings

import mcore_bridge as mb
import peft
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

# Every linear layer of these is an expert's or attention's: PEFT opens them with Transformers 4 (a module per expert) and 5 (one
# tensor of all experts, for which PEFT stacks the adapters). gpt_oss and llama4 keep all experts in one tensor on disk too.
ADAPTERS = {
    "qwen3_moe": dict(mlp_only_layers=[]),
    "mixtral": {},
    "minimax_m2": {},
    "olmoe": {},
    "gpt_oss": {},
    "llama4": {},
}
ADAPTERS = {name: overrides for name, overrides in ADAPTERS.items() if name in tiny.MOE_FAMILIES}
MIXED = {"qwen3_moe": {}, "qwen2_moe": {}, "glm4_moe": {}}


def adapted(family, folder, **overrides):
    hf_model = tiny.save(family, folder, **overrides)
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)))
    (model,) = mb.get_mcore_model(config)
    config.bridge.load_weights([model], folder)
    mb.add_lora([model], mb.LoraOptions(r=3, lora_alpha=6))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    return hf_model, config, model


@pytest.mark.parametrize("family", ADAPTERS)
def test_opens_in_peft(family, tmp_path):
    hf_model, config, model = adapted(family, tmp_path / "base", **ADAPTERS[family])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny.save_adapter(config, [model], tmp_path / "adapter", tmp_path / "base")
    ids, labels = tiny.rows(2, 20)
    base = hf_model(ids).logits.detach()
    expected = peft.PeftModel.from_pretrained(hf_model, tmp_path / "adapter").eval()(ids).logits
    assert tiny.relative(model(ids, None), expected) < 2e-5
    assert tiny.relative(base, expected) > 1e-3, "the adapter does nothing"

    model(ids, None, labels=labels).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".lora_" in name), name

    # Back again, into a model that has another adapter there.
    (other,) = mb.get_mcore_model(config)
    config.bridge.load_weights([other], tmp_path / "base")
    mb.add_lora([other], mb.LoraOptions(r=3, lora_alpha=6))
    config.bridge.load_weights([other], tmp_path / "adapter", peft_format=True)
    with torch.no_grad():
        assert torch.equal(model(ids, None), other(ids, None))


@pytest.mark.parametrize("family", MIXED)
def test_says_when_peft_cannot(family, tmp_path):
    """PEFT with Transformers 5 takes gate_proj, up_proj and down_proj for the experts' only; with Transformers 4 it opens all."""
    hf_model, config, model = adapted(family, tmp_path / "base", **MIXED[family])
    with pytest.warns(UserWarning, match="merge_lora"):
        tiny.save_adapter(config, [model], tmp_path / "adapter", tmp_path / "base")
    if tiny.TRANSFORMERS_4:
        ids, _ = tiny.rows(2, 20)
        expected = peft.PeftModel.from_pretrained(hf_model, tmp_path / "adapter").eval()(ids).logits
        assert tiny.relative(model(ids, None), expected) < 2e-5


@pytest.mark.parametrize("family", [*ADAPTERS, "qwen2_moe", "glm4_moe"])
def test_merge(family, tmp_path):
    _, config, model = adapted(family, tmp_path / "base", **ADAPTERS.get(family, {}))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    config.bridge.save_weights([model], tmp_path / "merged", merge_lora=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    (tmp_path / "merged" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager", dtype=torch.float32)
    ids, _ = tiny.rows(2, 20)
    with torch.no_grad():
        assert tiny.relative(model(ids, None), merged(ids).logits) < 2e-5
