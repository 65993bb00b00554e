"""LoRA against PEFT: same logits, same gradients, files opened both ways."""

import mcore_bridge as mb
import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

OPTIONS = {
    "all_linear": dict(r=4, lora_alpha=8, target_modules=["all-linear"]),
    "rslora_parts": dict(r=3, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]),
    "one_layer": dict(r=2, lora_alpha=4, target_regex=r"model\.layers\.[12]\.self_attn\.(k|o)_proj"),
    "saved_modules": dict(r=4, lora_alpha=8, target_modules=["linear_qkv"], modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.fixture(scope="module", params=["llama3_biases_tied", "qwen3", "qwen2"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny.save(request.param, path)
    return path


def engine(folder, options):
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)))
    models = mb.get_mcore_model(config)
    config.bridge.load_weights(models, folder)
    mb.add_lora(models, mb.LoraOptions(**options))
    with torch.no_grad():  # a fresh B is zero and would hide the adapter
        torch.manual_seed(3)
        for name, parameter in models[0].named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            elif parameter.requires_grad and ".lora_A." not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return config, models


def open_in_peft(folder, adapter, trainable=False):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, adapter, is_trainable=trainable).eval()


@pytest.mark.parametrize("kind", OPTIONS)
def test_adapter_opens_in_peft(folder, kind, tmp_path):
    config, models = engine(folder, OPTIONS[kind])
    tiny.save_adapter(config, models, tmp_path / "adapter", folder)
    peft_model = open_in_peft(folder, tmp_path / "adapter", trainable=True)
    ids, labels = tiny.rows(2, 20)
    expected = peft_model(ids).logits
    actual = models[0](ids)
    assert tiny.relative(actual, expected) < 2e-5
    with torch.no_grad():
        base = peft_model.get_base_model()
        with peft_model.disable_adapter():
            assert tiny.relative(base(ids).logits, expected) > 1e-3, "the adapter does nothing"

    # Gradients of the adapter, through the file names.
    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").backward()
    models[0](ids, labels=labels).sum().backward()
    gradients = {}
    for name, parameter in models[0].named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    with torch.no_grad():
        for name, parameter in models[0].named_parameters():
            if name in gradients:
                parameter.copy_(gradients[name])
    exported = dict(config.bridge.export_weights(models, peft_format=True))
    expected_gradients = {
        name.replace(".default", "").replace("modules_to_save.", ""): p.grad
        for name, p in peft_model.named_parameters()
        if p.requires_grad
    }
    tied = not config.untie_embeddings_and_output_weights
    if kind == "saved_modules" and tied:  # one matrix here, two in PEFT: the gradients add up
        total = sum(g for n, g in expected_gradients.items() if "embed_tokens" in n or "lm_head" in n)
        for name in list(expected_gradients):
            if "embed_tokens" in name or "lm_head" in name:
                expected_gradients[name] = total
    assert exported.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert tiny.relative(exported[name], gradient) < 1e-4, name


def test_peft_adapter_loads_here(folder, tmp_path):
    """An adapter that PEFT made (with its own A for q, k and v) gives the same logits here, and saves back unchanged."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(5)
    peft_model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()
    peft_model.save_pretrained(tmp_path / "adapter")
    config, models = engine(folder, OPTIONS["all_linear"])
    config.bridge.load_weights(models, tmp_path / "adapter", peft_format=True)
    ids, _ = tiny.rows(2, 20)
    with torch.no_grad():
        assert tiny.relative(models[0](ids), peft_model(ids).logits) < 2e-5
    tiny.save_adapter(config, models, tmp_path / "again", folder)
    before, after = (
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
        load_file(tmp_path / "again/adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("kind", OPTIONS)
def test_merge(folder, kind, tmp_path):
    """The merged model gives the adapted model's logits in Transformers; nothing in memory changes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind == "saved_modules" and "tied" in folder.name:
        pytest.skip("covered by test_adapter_opens_in_peft")
    config, models = engine(folder, OPTIONS[kind])
    before = {name: tensor.clone() for name, tensor in models[0].named_parameters()}
    config.bridge.save_weights(models, tmp_path / "merged", merge_lora=True)
    for name, tensor in models[0].named_parameters():
        assert torch.equal(tensor, before[name]), name
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    ids, _ = tiny.rows(2, 20)
    with torch.no_grad():
        assert tiny.relative(models[0](ids), merged(ids).logits) < 2e-5


def test_dropout_acts_in_training_only(folder):
    config, models = engine(folder, dict(r=4, lora_dropout=0.5))
    ids, _ = tiny.rows(1, 12)
    model = models[0]
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_module_tree(folder):
    config, models = engine(folder, OPTIONS["all_linear"])
    names = dict(models[0].named_parameters())
    assert "decoder.layers.0.self_attention.linear_qkv.lora_A.default.weight" in names
    assert "decoder.layers.0.self_attention.linear_qkv.base_layer.weight" in names
    layer = models[0].get_submodule("decoder.layers.0.self_attention.linear_qkv")
    assert isinstance(layer, mb.LoraParallelLinear)
    assert layer.lora_A["default"].weight.requires_grad if hasattr(layer.lora_A, "__getitem__") else True
    assert not names["decoder.layers.0.self_attention.linear_qkv.base_layer.weight"].requires_grad


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(target_modules=["q_porj"]), "q_porj"),
        (dict(target_modules=["lm_head"]), "modules_to_save"),
        (dict(target_regex="("), "regular expression"),
        (dict(target_regex="nothing"), "matches no module"),
        (dict(r=0), "at least 1"),
        (dict(lora_dropout=1.5), "lora_dropout"),
        (dict(modules_to_save=["q_proj"]), "fused"),
        (dict(modules_to_save=["nowhere"]), "nowhere"),
    ],
)
def test_bad_options(folder, options, text):
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)))
    models = mb.get_mcore_model(config)
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        mb.add_lora(models, mb.LoraOptions(**options))


def test_bad_adapter_files(folder, tmp_path):
    config, models = engine(folder, OPTIONS["all_linear"])
    tiny.save_adapter(config, models, tmp_path / "adapter", folder)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "v_proj.lora_B" in key)
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(missing, file)
    with pytest.raises(KeyError, match="v_proj.lora_B"):
        config.bridge.load_weights(models, tmp_path / "adapter", peft_format=True)
    save_file({**missing, name: tensors[name][:, :1].contiguous()}, file)
    with pytest.raises(ValueError, match="v_proj.lora_B"):
        config.bridge.load_weights(models, tmp_path / "adapter", peft_format=True)
