"""Families that keep their routers in float32 beside bfloat16 weights, against Transformers, which does so too."""

import mcore_bridge as mb
import pytest
import tiny
import torch
import torch.nn.functional as F
from mcore_bridge.bridge import convert_checkpoint
from mcore_bridge.megatron import from_megatron, to_megatron
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

FAMILIES = [name for name in ("dots1", "glm4_moe", "hy_v3", "ernie4_5_moe") if name in tiny.MOE_FAMILIES]
OTHERS = [name for name in tiny.MOE_FAMILIES if name not in (*FAMILIES, "glm4_moe_air")]
CORRECTIONS = ("e_score_correction_bias", "mlp.expert_bias")


def is_gate(name):
    return name.endswith(("mlp.gate.weight", "mlp.router.gate.weight"))


def narrow(hf_model):
    """bfloat16 but for the routers, as 5 loads all of these families (4 some of them)."""
    gates = {name: parameter.detach().clone() for name, parameter in hf_model.named_parameters() if is_gate(name)}
    corrections = {name: buffer.clone() for name, buffer in hf_model.named_buffers() if name.endswith(CORRECTIONS)}
    hf_model.bfloat16()
    for name, parameter in hf_model.named_parameters():
        if name in gates:
            parameter.data = gates[name]
    for name, correction in corrections.items():
        path, _, last = name.rpartition(".")
        hf_model.get_submodule(path)._buffers[last] = correction
    for name, parameter in hf_model.named_parameters():
        if name.endswith(CORRECTIONS):
            parameter.data = parameter.data.float()
    return hf_model


def save(name, folder, change=None):
    hf_model = tiny.build(name)
    if change:
        change(hf_model)
    narrow(hf_model)
    hf_model.config.dtype = hf_model.config.torch_dtype = torch.bfloat16
    hf_model.save_pretrained(folder)
    return hf_model


def load(folder, **fields):
    config = mb.ModelConfig(**{**mb.hf_to_mcore_config(str(folder)), "params_dtype": "bfloat16", **fields})
    models = mb.get_mcore_model(config, device="cpu")
    config.bridge.load_weights(models, folder)
    return models[0]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return save(request.param, folder), load(folder), folder


def routers(model):
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("router.weight")}


def test_what_is_float32(pair):
    """The routers alone, with values that bfloat16 does not have."""
    hf_model, model, folder = pair
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes and {name for name, dtype in dtypes.items() if dtype == torch.float32} == routers(model).keys()
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    stored = tiny.stored(folder)
    wide = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in stored if is_gate(name) or name.endswith(CORRECTIONS)}
    if not tiny.TRANSFORMERS_4:  # all that Transformers keeps in float32 is kept so here
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert {name: value.dtype for name, value in again.state_dict().items()} == {
            name: value.dtype for name, value in hf_model.state_dict().items()
        }


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_have_none(name, tmp_path):
    tiny.save(name, tmp_path)
    model = load(tmp_path)
    assert {parameter.dtype for _, parameter in model.named_parameters()} == {torch.bfloat16}
    for name, router in routers(load(tmp_path, moe_router_weight_in_fp32=True)).items():  # but may
        assert router.dtype == torch.float32, name


def test_round_trip(pair, tmp_path):
    """Bit for bit, in a file, as a stream, and in what Transformers opens again."""
    hf_model, model, folder = pair
    stored = tiny.stored(folder)
    assert all((stored[name] != stored[name].bfloat16().float()).float().mean() > 0.9 for name in stored if is_gate(name))
    model.config.bridge.save_weights([model], tmp_path / "out", max_shard_size="50KB")
    for copy in (tiny.stored(tmp_path / "out"), dict(model.config.bridge.export_weights([model]))):
        assert copy.keys() == stored.keys()
        for name, tensor in stored.items():
            assert copy[name].dtype == tensor.dtype and torch.equal(copy[name], tensor), name
    if not tiny.TRANSFORMERS_4:
        hf_model.config.save_pretrained(tmp_path / "out")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
        for name, tensor in hf_model.state_dict().items():
            assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


def test_fp8_files(pair, tmp_path):
    _, model, folder = pair
    model.config.bridge.save_weights([model], tmp_path, quantization="fp8")
    stored, saved = tiny.stored(folder), tiny.stored(tmp_path)
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in saved.values())
    for name in filter(is_gate, stored):
        assert saved[name].dtype == torch.float32 and torch.equal(saved[name], stored[name])
    streamed = dict(model.config.bridge.export_weights([model], quantization="fp8"))
    assert streamed.keys() == saved.keys()
    for name, tensor in streamed.items():
        assert tensor.dtype == saved[name].dtype and torch.equal(tensor.view(torch.uint8), saved[name].view(torch.uint8)), name
    with pytest.raises(ValueError, match="fp8 is what whole models are exported in"):
        next(model.config.bridge.export_weights([model], quantization="mxfp4"))


def test_offline_files(pair, tmp_path):
    """Conversions without a model cast everything but the routers and their corrections."""
    _, _, folder = pair
    stored = tiny.stored(folder)
    convert_checkpoint(folder, tmp_path / "half", torch_dtype="float16")
    for name, tensor in tiny.stored(tmp_path / "half").items():
        wide = is_gate(name) or name.endswith(CORRECTIONS)
        assert tensor.dtype == (torch.float32 if wide else torch.float16)
        assert not wide or torch.equal(tensor, stored[name]), name
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)), params_dtype="bfloat16")
    to_megatron(config, folder, tmp_path / "megatron")
    from_megatron(config, tmp_path / "megatron", tmp_path / "back", 50_000)
    back = tiny.stored(tmp_path / "back")
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_bfloat16_files(pair, tmp_path):
    """As most of these families are published: routers take the values there are."""
    _, _, folder = pair
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    stored = tiny.stored(folder)
    narrowed = {name: tensor.bfloat16() if is_gate(name) else tensor for name, tensor in stored.items()}
    save_file(narrowed, tmp_path / "model.safetensors")
    model = load(tmp_path)
    copy = dict(model.config.bridge.export_weights([model]))
    for name in filter(is_gate, stored):
        assert copy[name].dtype == torch.float32 and torch.equal(copy[name], narrowed[name].float())


def hf_choices(hf_model, ids):
    """Its logits and which experts it takes, for every layer with experts the int64 [length * rows, k] of ours."""
    found, (rows, length) = [], ids.shape

    def note(module, given, output):
        if isinstance(output, tuple):
            chosen = next(x for x in output if not x.is_floating_point())
        else:  # 4's ernie4_5_moe has no router but scores with their correction
            chosen = output.topk(hf_model.config.moe_k).indices
        found.append(chosen.view(rows, length, -1).transpose(0, 1).flatten(0, 1))

    last = ("topkrouter", "moestatics")
    routers = [module for module in hf_model.modules() if type(module).__name__.lower().endswith(last[0])]
    routers = routers or [module for module in hf_model.modules() if type(module).__name__.lower().endswith(last[1])]
    hooks = [module.register_forward_hook(note) for module in routers]
    logits = hf_model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, found


def hf_loss(logits, labels):
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def test_logits_and_gradients(pair):
    """Both sides in bfloat16, with the same choices: the routers' gradients are sums in float32 that nothing rounds."""
    hf_model, model, _ = pair
    ids, labels = tiny.rows(2, 24, seed=5)
    expected, choices = hf_choices(hf_model, ids)
    with mb.replay_routing(model, [[choice] * 2 for choice in choices]):
        logits = model(ids, None)
        assert tiny.relative(logits, expected) < 2e-2
        hf_loss(expected, labels).backward()
        model(ids, None, labels=labels).sum().backward()
    gates = [parameter.grad for name, parameter in hf_model.named_parameters() if is_gate(name)]
    ours = [router.grad for router in routers(model).values()]
    assert len(gates) == len(ours) > 0
    for actual, wanted in zip(ours, gates, strict=True):
        assert actual.dtype == wanted.dtype == torch.float32
        there = actual[actual != 0]
        assert (there != there.bfloat16().float()).float().mean() > 0.9
        assert tiny.relative(actual, wanted) < 5e-2
    for _, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
    for module in (hf_model, model):
        module.zero_grad(set_to_none=True)


def nothing_but_routers(hf_model):
    """All branches give zero, so that every router sees the normed embedding, bit for bit what it is on the other side; experts
    differ by less than bfloat16 can say."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            if name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj")):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            elif is_gate(name):
                row = torch.randn(1, parameter.shape[1], generator=generator) * 0.1
                parameter.copy_(row * (1 + 2e-3 * torch.rand(parameter.shape, generator=generator)))
        for name, value in hf_model.state_dict().items():
            if name.endswith(CORRECTIONS):
                value.zero_()


@pytest.mark.parametrize("name", FAMILIES)
def test_choices(name, tmp_path):
    """What only float32 tells apart is told apart as Transformers does."""
    hf_model = save(name, tmp_path, nothing_but_routers)
    ids, _ = tiny.rows(2, 24, seed=6)
    with torch.no_grad():
        _, expected = hf_choices(hf_model, ids)
    for in_fp32 in (True, False):
        model = load(tmp_path, moe_router_weight_in_fp32=in_fp32)
        with mb.record_routing(model) as choices, torch.no_grad():
            model(ids, None)
        alike = [
            (choice.sort().values == wanted.sort().values).all(-1).float().mean().item()
            for (choice,), wanted in zip(choices, expected, strict=True)
        ]
        assert all(share == 1 if in_fp32 else share < 0.9 for share in alike), alike


@pytest.mark.parametrize("frozen", [False, True])
def test_float16(pair, frozen):
    """Gradients pass through float16 also where all that trains is float32: the loss is scaled."""
    _, _, folder = pair
    model = load(folder, params_dtype="float16")
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in routers(model))
    before = {name: router.detach().clone() for name, router in routers(model).items()}
    trainer = mb.Trainer([model], lr=1e-3, train_iters=4, lr_warmup_iters=0, initial_loss_scale=2.0**10)
    ids, labels = tiny.rows(2, 24, seed=5)
    results = [trainer.train_step([dict(input_ids=ids, labels=labels)]) for _ in range(4)]
    assert [result.loss_scale for result in results] == [2.0**10] * 4 and not any(result.skipped for result in results)
    assert frozen or results[-1].loss < results[0].loss
    for name, router in routers(model).items():
        assert router.dtype == torch.float32 and not torch.equal(router, before[name])
        assert (router != router.half().float()).float().mean() > 0.9


def test_lora(pair, tmp_path):
    """A frozen router stays bit for bit, beside adapters in the model's precision and merged into files."""
    _, _, folder = pair
    model = load(folder)
    mb.add_lora([model], mb.LoraOptions(r=4))
    trainer = mb.Trainer([model], lr=1e-2, train_iters=2, lr_warmup_iters=0)
    ids, labels = tiny.rows(2, 24, seed=5)
    for _ in range(2):
        trainer.train_step([dict(input_ids=ids, labels=labels)])
    model.config.bridge.save_weights([model], tmp_path, merge_lora=True)
    stored, merged = tiny.stored(folder), tiny.stored(tmp_path)
    for name, tensor in merged.items():
        assert tensor.dtype == stored[name].dtype
        assert not is_gate(name) or torch.equal(tensor, stored[name]), name
    assert any(not torch.equal(tensor, stored[name]) for name, tensor in merged.items())
