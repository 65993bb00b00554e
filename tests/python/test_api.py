"""The drop-in API: configs, modules, errors."""

import copy
import subprocess
import sys
import time

import mcore_bridge as mb
import pytest
import tiny
import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    tiny.save("qwen3", path)
    return path


def test_import_is_light():
    """`import mcore_bridge` adds at most 0.3 s to `import torch` and does not load the engine or Transformers."""
    code = (
        "import torch, sys, time; start = time.perf_counter(); import mcore_bridge; took = time.perf_counter() - start; "
        "assert 'transformers' not in sys.modules; print(took)"
    )
    took = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert took < 0.3


def test_config_round_trip(folder):
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(folder)
    fields = mb.hf_to_mcore_config(hf)
    config = mb.ModelConfig(**fields, params_dtype=torch.bfloat16)
    assert config.hf_config is hf and config.params_dtype is torch.bfloat16
    assert config.num_layers == 4 and config.num_query_groups == 4 and config.kv_channels == 12 and config.qk_layernorm
    assert config.hf_model_type == "qwen3" and config.padded_vocab_size == tiny.VOCAB
    assert mb.ModelConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert copy.deepcopy(config).bridge is config.bridge
    config.attention_dropout = 0.1
    assert config.attention_dropout == 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        config.attention_dropout = 2.0
    assert config.attention_dropout == 0.1


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(hiden_size=64), (KeyError, ValueError), "hidden_size"),
        (dict(num_layers="four"), ValueError, "num_layers"),
        (dict(num_layers=-1), ValueError, "num_layers"),
        (dict(tensor_model_parallel_size=3), ValueError, "tensor_model_parallel_size"),
        (dict(pipeline_model_parallel_size=3), ValueError, "pipeline_model_parallel_size"),
        (dict(fp16=True, bf16=True), ValueError, "fp16"),
        (dict(num_moe_experts=8, moe_router_topk=9), ValueError, "moe_router_topk"),
        (dict(normalization="LayerNorm"), ValueError, "normalization"),
    ],
)
def test_bad_config(folder, change, error, text):
    with pytest.raises(error, match=text):
        mb.ModelConfig(**{**mb.hf_to_mcore_config(str(folder)), **change})


def test_family_lookup():
    from mcore_bridge.model import get_mcore_model_type

    assert get_mcore_model_type("qwen3") == "qwen3" and get_mcore_model_type("no_such_model") is None


def test_unknown_model_type():
    with pytest.raises(ValueError, match="llama"):
        mb.hf_to_mcore_config(dict(model_type="no_such_model", hidden_size=8))


def test_module_behaviour(folder):
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)))
    (model,) = mb.get_mcore_model(config)
    config.bridge.load_weights([model], folder)
    assert isinstance(model, torch.nn.Module) and isinstance(model, mb.GPTModel)
    parameters = dict(model.named_parameters())
    assert "decoder.layers.3.mlp.linear_fc1.layer_norm_weight" in parameters
    assert all(isinstance(p, torch.nn.Parameter) for p in parameters.values())
    assert {p.data_ptr() for p in model.parameters()} == {t.data_ptr() for _, t in model.engine.named_parameters()}
    assert mb.unwrap_model([torch.nn.DataParallel(model)])[0] is model

    ids, labels = tiny.rows(2, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=labels).sum() / (labels != -100).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (other,) = mb.get_mcore_model(config)
    other.load_state_dict(state)
    assert torch.equal(other(ids), model(ids))
    model.float()
    with pytest.raises(ValueError, match="params_dtype"):
        model.half()
    with pytest.raises(RuntimeError, match="engine"):
        model.get_submodule("decoder.layers.0").forward(ids)


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(recompute_num_layers=3), dict(recompute_method="block", recompute_num_layers=1)],
    ids=["each", "threes", "block"],
)
@pytest.mark.parametrize("lora", [False, True])
def test_recompute_gives_the_same_gradients(folder, settings, lora):
    """Bit for bit, dropout included, whatever is kept."""
    ids, labels = tiny.rows(2, 12)
    found = []
    for changes in (dict(), dict(recompute_granularity="full", **settings)):
        config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)), hidden_dropout=0.2, **changes)
        models = mb.get_mcore_model(config)
        config.bridge.load_weights(models, folder)
        if lora:
            mb.add_lora(models, mb.LoraOptions(r=2, lora_dropout=0.3))
        models[0].train()
        mb.set_random_seed(11)
        loss = models[0](ids, labels=labels).sum()
        loss.backward()
        found.append(
            (loss.detach(), {name: p.grad for name, p in models[0].named_parameters() if p.requires_grad}, torch.rand(1))
        )
    (loss, gradients, after), (again, recomputed, after_again) = found
    assert torch.equal(loss, again) and torch.equal(after, after_again), "the random stream goes on as if nothing was recomputed"
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_export_stream(folder):
    """The stream loads into a Transformers model, and converter and only_master_rank work."""
    hf_model = tiny.build("qwen3")
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)))
    models = mb.get_mcore_model(config)
    config.bridge.load_weights(models, folder)
    again = tiny.build("qwen3", tie_word_embeddings=False)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    again.load_state_dict(dict(config.bridge.export_weights(models, target_device="cpu")))
    ids, _ = tiny.rows(1, 8)
    assert torch.equal(again(ids).logits, hf_model(ids).logits)
    renamed = dict(config.bridge.export_weights(models, converter=lambda n, t: None if "norm" in n else ("x." + n, t)))
    assert renamed and all(name.startswith("x.") and "norm" not in name for name in renamed)


def test_seed():
    with pytest.raises(ValueError, match="positive"):
        mb.set_random_seed(0)
    mb.set_random_seed(5)
    first = torch.rand(3)
    mb.set_random_seed(5)
    assert torch.equal(first, torch.rand(3))


def test_forward_errors(folder):
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)))
    (model,) = mb.get_mcore_model(config)
    ids, _ = tiny.rows(2, 8)
    with pytest.raises(ValueError, match="packed"):
        model(ids, packed_seq_params=mb.PackedSeqParams(torch.tensor([0, 8], dtype=torch.int32)))
    with pytest.raises(ValueError, match="ends at"):
        model(ids[:1], packed_seq_params=mb.PackedSeqParams(torch.tensor([0, 5], dtype=torch.int32)))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 7))


def test_trainer_errors(folder):
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)))
    models = mb.get_mcore_model(config)
    config.bridge.load_weights(models, folder)
    ids, labels = tiny.rows(2, 8)
    with pytest.raises((KeyError, ValueError), match="learning_rate"):
        mb.Trainer(models, learning_rate=1.0)
    with pytest.raises(ValueError, match="lr_decay_style"):
        mb.Trainer(models, lr=1e-3, train_iters=2, lr_decay_style="sideways")
    trainer = mb.Trainer(models, lr=1e-3, train_iters=4)
    with pytest.raises(ValueError):
        trainer.train_step([])
    with pytest.raises(ValueError, match="labels"):
        trainer.train_step([dict(input_ids=ids)])
    with pytest.raises(ValueError):
        trainer.train_step([dict(input_ids=ids, labels=torch.full_like(labels, -100))])
    with pytest.raises(KeyError, match="input_id"):
        trainer.train_step([dict(input_id=ids, labels=labels)])
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    with torch.no_grad():
        name, parameter = next(iter(models[0].named_parameters()))
        parameter[5, 0] = float("nan")
        before[name] = parameter.detach().clone()
    ids[0, 0] = 5
    with pytest.raises(FloatingPointError, match="1"):
        trainer.train_step([dict(input_ids=ids, labels=labels)])
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter.detach().nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_topology():
    from mcore_bridge.engine import _core

    topology = _core.Topology(16, tensor=2, pipeline=2, context=2)
    assert topology.data == 2
    assert topology.groups("tp")[0] == [0, 1]
    place = topology.coordinates(13)
    assert (place.tp, place.cp, place.dp, place.pp) == (1, 0, 1, 1)
    with pytest.raises(ValueError, match="6"):
        _core.Topology(6, tensor=4)


def test_time_of_import_of_engine():
    start = time.perf_counter()
    from mcore_bridge import engine  # noqa: F401

    assert time.perf_counter() - start < 5
