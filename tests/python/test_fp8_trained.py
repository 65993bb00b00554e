"""fp8_param for weights that train: codes in memory, fp32 masters in the optimizer. Tensorwise and blockwise such a run is, bit for
bit, the run that keeps bf16 weights and quantises them for every step; delayed ones are scaled for their own magnitude.

MCB_TEST_DEVICE=cuda runs the CUDA kernels (compute capability 9.0)."""

import mcore_bridge as mb
import pytest
import tiny
import torch
from mcore_bridge import _core
from mcore_bridge._core import kernels
from test_fp8 import BASE, DEVICE, RECIPES, batch, build, quantize, random
from test_fp8_param import bits, codes_of, fp8
from tiny import stored as tensors

OPTIONS = dict(lr=1e-3, lr_decay_style="constant", train_iters=100)
SAME = ["tensorwise", "blockwise"]  # as without fp8_param
STEPS = 12
OPTIMIZERS = {
    "adam": {},
    "sgd": dict(optimizer="sgd", sgd_momentum=0.9, lr=1e-1),
    "muon": dict(optimizer="muon"),
    # Codes lie in buckets of their own, so that a fraction is other weights; a GPU updates with less exact roots than the host.
    "offload": dict(optimizer_cpu_offload=True, optimizer_offload_fraction=0.37 if DEVICE == "cpu" else 1.0),
    "bf16_gradients": dict(main_grads_dtype="bf16", clip_grad=0.0),
    "no_shard": dict(data_parallel_sharding_strategy="no_shard", exp_avg_dtype="bf16", overlap_grad_reduce=True),
}


def steps(trainer, first, count):
    """Two global batches in turn, which can be learnt."""
    return [trainer.train_step([batch(2 * (i % 2)), batch(2 * (i % 2) + 1)]).loss for i in range(first, first + count)]


def exported(models):
    return {name: tensor.clone() for name, tensor in models[0].config.bridge.export_weights(models)}


def same_bits(left, right):
    assert left.keys() == right.keys() and left
    for name in left:
        assert torch.equal(bits(left[name]), bits(right[name])), name


def check_codes(models):
    """Every weight's codes and scales are what quantising the whole of it gives, for what is exported."""
    values = {name: tensor for name, tensor in exported(models).items()}
    scaling = "blocks" if models[0].config.fp8_recipe == "blockwise" else "tensor"
    for name, codes in codes_of(models).items():
        if not name.endswith("linear_fc2.weight"):  # the others are fused of several
            continue
        layer = name.split(".")[2]
        matrix = values[f"model.layers.{layer}.mlp.down_proj.weight"].to(DEVICE)
        (expected, scale), _ = quantize(matrix, scaling)
        assert torch.equal(bits(codes), bits(expected)), name
        used = models[0].get_buffer(name + "_scale_inv")
        blocks = matrix.shape[1] // 128
        assert torch.equal(used[:, :blocks], scale[:, :blocks]) if scaling == "blocks" else torch.equal(used, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scaling", ["tensor", "blocks"])
@pytest.mark.parametrize("cuts", [[0], [0, 64, 128 * 640 + 192, 200_000], [0, 1, 130, 20_003, 99_999]])
def test_parts_are_the_whole(cuts, scaling, dtype):
    values = random(384, 640, dtype=torch.float32).clamp(-3e4, 3e4)
    values[:128, 128:256] = 0
    (codes, scale), _ = quantize(values.to(dtype), scaling)
    own = torch.zeros_like(scale)
    found = kernels.fp8_parts(values, cuts, own, torch.empty(0, dtype=dtype))
    assert torch.equal(bits(found), bits(codes))
    used = (slice(None), slice(5)) if scaling == "blocks" else (slice(None),)
    assert torch.equal(own[used], scale[used])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recipe", SAME)
def test_training_is_that_of_wide_weights(recipe, optimizer):
    seen = {}
    for param in (False, True):
        models = build(**fp8(recipe, fp8_param=param))
        before = {name: bits(p).clone() for name, p in codes_of(models).items()}
        trainer = mb.Trainer(models, **{**OPTIONS, **OPTIMIZERS[optimizer]})
        losses = steps(trainer, 0, STEPS) + [trainer.evaluate([batch(9)])]
        assert param == bool(before) and not any(torch.equal(bits(p), before[n]) for n, p in codes_of(models).items())
        seen[param] = losses, exported(models)
        if param:
            check_codes(models)
    assert seen[True][0] == seen[False][0] and seen[True][0][-2] < seen[True][0][0]
    same_bits(seen[True][1], seen[False][1])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_precisions(dtype):
    seen = {}
    for param in (False, True):
        models = build(**{**fp8("tensorwise", fp8_param=param), "params_dtype": dtype})
        trainer = mb.Trainer(models, **OPTIONS)
        seen[param] = steps(trainer, 0, 4), exported(models)
    assert seen[True][0] == seen[False][0]
    same_bits(seen[True][1], seen[False][1])


def test_some_of_the_base_trains_beside_an_adapter():
    """Weights that train when they are loaded have masters of the values, the others codes alone."""
    seen = {}
    for param in (False, True):
        config = mb.ModelConfig(**{**BASE, **fp8("tensorwise", fp8_param=param)})
        models = mb.get_mcore_model(config, device=DEVICE)
        mb.add_lora(models, mb.LoraOptions(r=4))
        trained = models[0].get_parameter("decoder.layers.1.mlp.linear_fc2.base_layer.weight").requires_grad_(True)
        config.bridge.initialize(models, seed=1)
        codes = {name: bits(p).clone() for name, p in codes_of(models).items()}
        trainer = mb.Trainer(models, **OPTIONS)
        seen[param] = steps(trainer, 0, 4), exported(models)["model.layers.1.mlp.down_proj.weight"]
        changed = [p for name, p in codes_of(models).items() if not torch.equal(bits(p), codes[name])]
        assert len(changed) == int(param) and (not param or changed[0] is trained)
    assert seen[True][0] == seen[False][0] and torch.equal(seen[True][1], seen[False][1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_are_made_from_the_masters(recipe):
    models = build(**fp8(recipe, fp8_param=True, fp8_amax_history_len=2))
    trainer = mb.Trainer(models, **OPTIONS)
    check_codes(models)
    for step in range(3):
        steps(trainer, step, 1)
        check_codes(models)
    if recipe != "delayed":
        return
    # The history goes on with their magnitudes, for a run that keeps them wide.
    for name, values in _core.fp8_history([m.engine for m in models]).items():
        codes = models[0].get_parameter(name + ".weight")
        scale = models[0].get_buffer(name + ".weight_scale_inv")
        assert values[1, 0].item() == pytest.approx(scale.item() * 448, rel=1e-6) and codes.numel()


def test_frozen_layers_recompute_and_bf16_layers_beside():
    """Layers that are frozen, that stay in bf16 and that run again in backward."""
    seen = {}
    for param in (False, True):
        fields = fp8("tensorwise", fp8_param=param, first_last_layers_bf16=True, num_layers_at_end_in_bf16=0)
        models = build(**fields, recompute_granularity="full")
        for name, p in models[0].named_parameters():
            if "layers.1.mlp" in name or "embedding" in name:
                p.requires_grad_(False)
        frozen = {name: bits(p).clone() for name, p in codes_of(models).items() if not p.requires_grad}
        trainer = mb.Trainer(models, **OPTIONS)
        seen[param] = steps(trainer, 0, 4)
        assert all(torch.equal(bits(models[0].get_parameter(name)), value) for name, value in frozen.items())
        assert len(frozen) == (2 if param else 0) and len(codes_of(models)) == (8 if param else 0)
    assert seen[True] == seen[False]


def test_a_skipped_step_changes_nothing():
    models = build(**fp8("tensorwise", fp8_param=True))
    trainer = mb.Trainer(models, **OPTIONS)
    steps(trainer, 0, 1)
    before = {name: bits(t).clone() for name, t in models[0].state_dict().items()}, exported(models)
    assert trainer.train_step([batch(5)], loss_limit=1e-3).skipped
    same_bits({name: bits(t) for name, t in models[0].state_dict().items()}, before[0])
    same_bits(exported(models), before[1])


@pytest.mark.parametrize("recipe", SAME)
def test_masters_begin_with_the_checkpoint(tmp_path, recipe, capfd):
    """Nothing of a bf16 checkpoint is lost, whenever it is loaded; what is saved while training is the masters."""
    shape = dict(hidden_size=256, intermediate_size=256, head_dim=128, num_attention_heads=2, num_key_value_heads=2)
    tiny.save("qwen3", tmp_path / "plain", num_hidden_layers=2, **shape)
    given = tensors(tmp_path / "plain")
    config = mb.ModelConfig(**{**mb.hf_to_mcore_config(tmp_path / "plain"), **fp8(recipe, fp8_param=True)})
    bridge = config.bridge
    expected = {name: tensor.bfloat16() for name, tensor in given.items()}

    models = mb.get_mcore_model(config, device=DEVICE)
    bridge.load_weights(models, tmp_path / "plain")
    same_bits(exported(models), expected)
    trainer = mb.Trainer(models, **OPTIONS)
    same_bits(exported(models), expected)
    first = steps(trainer, 0, 2)
    trained = exported(models)
    bridge.save_weights(models, tmp_path / "trained")
    same_bits(tensors(tmp_path / "trained"), trained)
    # Another trainer begins with this one's masters, and one after loading with what was loaded.
    again = mb.Trainer(models, **OPTIONS)
    del trainer
    same_bits(exported(models), trained)
    bridge.load_weights(models, tmp_path / "plain")
    same_bits(exported(models), expected)
    last = mb.Trainer(models, **OPTIONS)
    del again
    assert steps(last, 0, 2) == first
    same_bits(exported(models), trained)
    assert "masters begin" not in capfd.readouterr().err
    # Without one the codes are all there is, which is said.
    del last
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in exported(models).items())
    mb.Trainer(models, **OPTIONS)
    assert "8 weights kept in FP8" in capfd.readouterr().err
    # Codes of the saved values are those of the masters.
    other = mb.get_mcore_model(config, device=DEVICE)
    bridge.load_weights(other, tmp_path / "trained")
    same_bits({n: bits(t) for n, t in other[0].state_dict().items()}, {n: bits(t) for n, t in models[0].state_dict().items()})


@pytest.mark.parametrize("recipe", SAME)
def test_memory(recipe):
    """A byte a number beside main gradient, master and moments; what the planner counts."""
    wide, narrow = (mb.Trainer(build(**fp8(recipe, fp8_param=param)), **OPTIONS) for param in (False, True))
    numbers = sum(p.numel() for p in codes_of(build(**fp8(recipe, fp8_param=True))).values())
    scales = sum(buffer.nbytes for buffer in build(**fp8(recipe, fp8_param=True))[0].buffers())
    saved = dict(parameters=numbers, optimizer=-scales)  # where ranks agree on magnitudes
    assert {key: wide.memory[key] - narrow.memory[key] for key in wide.memory} == {key: saved.get(key, 0) for key in wide.memory}
    request = dict(processes=1, micro_batch_size=1, global_batch_size=1, sequence_length=32, optimizer=OPTIONS)
    config = mb.ModelConfig(**{**BASE, **fp8(recipe, fp8_param=True)})
    planned = mb.plan_layout(config, **request)["stages"][0]["memory"]
    assert planned["weights"] == narrow.memory["parameters"] + scales
    assert planned["optimizer"] == narrow.memory["optimizer"] and planned["gradients"] == narrow.memory["gradients"]


def test_refusals():
    fields = fp8("tensorwise", fp8_param=True)
    models = build(**fields)
    tiny.refused(["fp8_param", "mcore_bridge.Trainer", "add_lora"], lambda: models[0](**batch()))
    with torch.no_grad():
        models[0](**batch())

    def trainer(**options):
        return lambda: mb.Trainer(models, **OPTIONS, **options)

    grads = dict(data_parallel_sharding_strategy="optim_grads")
    tiny.refused(["decoder.layers.0", "optim_grads", "no_shard"], trainer(**grads))
    tiny.refused(["sharded fully"], trainer(data_parallel_sharding_strategy="optim_grads_params"))
    tiny.refused(["decoder.layers.0", "main_params_dtype fp32"], trainer(main_params_dtype="bf16"))
    request = dict(processes=1, micro_batch_size=1, global_batch_size=1, sequence_length=32, optimizer=grads)
    tiny.refused(["decoder.layers.0", "no_shard"], lambda: mb.plan_layout(mb.ModelConfig(**{**BASE, **fields}), **request))
    mb.Trainer(build(lora=True, **fields), **OPTIONS, **grads)
