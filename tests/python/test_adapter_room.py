"""An adapter's B in the memory behind the frozen weight's rows, and its product beside the large one: the numbers of a model without either."""

import os

import mcore_bridge as mb
import pytest
import tiny
import torch

DEVICE = os.environ.get("MCB_TEST_DEVICE", "cpu")


def build(folder, device, targets, r=8, dtype="float32", dropout=0.0):
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(folder)), params_dtype=dtype)
    models = mb.get_mcore_model(config, device=device)
    config.bridge.load_weights(models, folder)
    mb.add_lora(models, mb.LoraOptions(r=r, lora_alpha=12, target_modules=targets, lora_dropout=dropout))
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in models[0].named_parameters():
            if ".lora_" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return config, models


def gradients(models, ids, labels, device):
    models[0].zero_grad()
    loss = models[0](ids.to(device), labels=labels.to(device)).sum() / labels.numel()
    loss.backward()
    return loss.item(), {
        key: parameter.grad.cpu().double() for key, parameter in models[0].named_parameters() if parameter.grad is not None
    }


def roomy(model):
    return [key for key, p in model.named_parameters() if key.endswith("base_layer.weight") and p.stride(0) > p.shape[1]]


@pytest.mark.parametrize("name", ["llama3_biases_tied", "qwen3"])
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj", "down_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("length", [16, 640], ids=["few_rows", "many_rows"])
def test_numbers_do_not_change(name, targets, length, tmp_path):
    tiny.save(name, tmp_path)
    ids, labels = tiny.rows(2, length, seed=1)
    reference = gradients(build(tmp_path, "cpu", targets)[1], ids, labels, "cpu")
    config, models = build(tmp_path, DEVICE, targets)
    for room in (False, True):
        if room:
            models[0].engine.make_room_for_adapters()
        assert len(roomy(models[0])) == (
            3 * config.num_layers if room and len(targets) == 1 else 2 * config.num_layers if room else 0
        )
        loss, found = gradients(models, ids, labels, DEVICE)
        assert abs(loss - reference[0]) < 2e-6 * abs(reference[0])
        assert found.keys() == reference[1].keys()
        for key, gradient in found.items():
            assert (gradient - reference[1][key]).norm() <= 2e-5 * reference[1][key].norm(), (key, room)


def test_dropout_is_of_the_adapter_alone(tmp_path):
    tiny.save("qwen3", tmp_path)
    ids, labels = tiny.rows(2, 16, seed=1)
    results = []
    for room in (False, True):
        _, models = build(tmp_path, DEVICE, ["all-linear"], dropout=0.4)
        if room:
            models[0].engine.make_room_for_adapters()
        models[0].train(True)
        mb.set_random_seed(5)
        results.append(gradients(models, ids, labels, DEVICE))
    assert abs(results[0][0] - results[1][0]) < 2e-6 * abs(results[0][0])
    for key, gradient in results[0][1].items():
        assert (gradient - results[1][1][key]).norm() <= 2e-5 * gradient.norm(), key


def test_files_and_merges_see_the_same_weights(tmp_path):
    source, first, second, other = (tmp_path / part for part in ("source", "first", "second", "other"))
    tiny.save("qwen3", source)
    config, models = build(source, DEVICE, ["all-linear"], dtype="bfloat16")
    before = {key: p.detach().cpu().clone() for key, p in models[0].named_parameters()}
    config.bridge.save_weights(models, first)
    models[0].engine.make_room_for_adapters()
    assert roomy(models[0])
    for key, parameter in models[0].named_parameters():
        assert torch.equal(parameter.detach().cpu(), before[key]), key
    config.bridge.save_weights(models, second)
    written = [tiny.stored(folder) for folder in (first, second)]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][key], written[1][key]) for key in written[0])
    for (key, one), (again, two) in zip(
        config.bridge.export_weights(build(source, DEVICE, ["all-linear"], dtype="bfloat16")[1]),
        config.bridge.export_weights(models),
        strict=True,
    ):
        assert key == again and torch.equal(one, two), key
    # Loaded where there is room.
    with torch.no_grad():
        model = tiny.build("qwen3")
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(other)
    config.bridge.load_weights(models, other)
    fresh = mb.get_mcore_model(config, device=DEVICE)
    config.bridge.load_weights(fresh, other)
    values = dict(models[0].named_parameters())
    for key, parameter in fresh[0].named_parameters():
        found = values.get(key, values.get(key.replace(".weight", ".base_layer.weight")))
        if found is None:
            found = values[key.replace("layer_norm_weight", "base_layer.layer_norm_weight")]
        assert torch.equal(found, parameter), key


def test_training_leaves_the_base_alone(tmp_path):
    tiny.save("qwen3", tmp_path)
    ids, labels = tiny.rows(2, 16, seed=1)
    losses = []
    for room in (False, True):
        _, models = build(tmp_path, DEVICE, ["all-linear"])
        if room:
            models[0].engine.make_room_for_adapters()
        base = {key: p.detach().clone() for key, p in models[0].named_parameters() if not p.requires_grad}
        trainer = mb.Trainer(models, lr=1e-3, lr_decay_style="constant", train_iters=6)
        losses.append([trainer.train_step([dict(input_ids=ids, labels=labels)]).loss for _ in range(6)])
        for key, parameter in models[0].named_parameters():
            if key in base:
                assert torch.equal(parameter, base[key]), key
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # Everything trains afterwards, as weights that lie together again.
    del trainer
    for parameter in models[0].parameters():
        parameter.requires_grad_(True)
    trainer = mb.Trainer(models, lr=1e-3, lr_decay_style="constant", train_iters=2)
    result = trainer.train_step([dict(input_ids=ids, labels=labels)])
    assert result.loss < losses[1][0] and not roomy(models[0])
