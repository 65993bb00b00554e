"""The engine's optimizers against torch.optim on the same gradients."""

import mcore_bridge as mb
import pytest
import tiny
import torch

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("optimizer")
    tiny.save("qwen3", path)
    return path


def build(folder):
    config = mb.ModelConfig(**mb.hf_to_mcore_config(folder))
    models = mb.get_mcore_model(config)
    config.bridge.load_weights(models, folder)
    return models


def batch(step):
    ids, labels = tiny.rows(2, 12, seed=step)
    return dict(input_ids=ids, labels=labels)


def by_trainer(folder, **options):
    models = build(folder)
    trainer = mb.Trainer(models, lr_decay_style="constant", clip_grad=0.0, **options)
    objects = [id(p) for p in models[0].parameters()]
    for step in range(STEPS):
        trainer.train_step([batch(step)])
    assert objects == [id(p) for p in models[0].parameters()]
    return {name: p.detach().clone() for name, p in models[0].named_parameters()}


def is_matrix(name):
    return not any(word in name for word in ("norm", "bias", "embedding", "output_layer"))


def by_torch(folder, *optimizers):
    """`optimizers`: functions from named parameters to a torch optimizer."""
    model = build(folder)[0]
    made = [make(dict(model.named_parameters())) for make in optimizers]
    for step in range(STEPS):
        b = batch(step)
        losses = model(b["input_ids"], labels=b["labels"])
        (losses.sum() / (b["labels"] != -100).sum()).backward()
        for optimizer in made:
            optimizer.step()
        for p in model.parameters():
            p.grad = None
    return {name: p.detach() for name, p in model.named_parameters()}


def groups(parameters, decay):
    plain = [p for name, p in parameters.items() if "norm" in name or name.endswith("bias")]
    rest = [p for name, p in parameters.items() if not ("norm" in name or name.endswith("bias"))]
    return [dict(params=rest, weight_decay=decay), dict(params=plain, weight_decay=0.0)]


def distance(actual, expected, start):
    """Largest error of a parameter relative to how far it went."""
    return max(((actual[name] - p).norm() / (p - start[name]).norm().clamp_min(1e-6)).item() for name, p in expected.items())


def start_of(folder):
    return {name: p.detach() for name, p in build(folder)[0].named_parameters()}


def test_adamw(folder):
    ours = by_trainer(folder, lr=1e-3, weight_decay=0.1)
    theirs = by_torch(folder, lambda p: torch.optim.AdamW(groups(p, 0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8))
    assert distance(ours, theirs, start_of(folder)) < 2e-3


def test_sgd(folder):
    ours = by_trainer(folder, lr=1e-2, weight_decay=0.1, optimizer="sgd", sgd_momentum=0.9)
    theirs = by_torch(folder, lambda p: torch.optim.SGD(groups(p, 0.1), lr=1e-2, momentum=0.9))
    assert distance(ours, theirs, start_of(folder)) < 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon(folder, nesterov, monkeypatch):
    """torch's Muon multiplies in bfloat16, whose rounding its coefficients blow up: here in float32 on both sides."""
    import torch.optim._muon as theirs_module

    def orthogonalized(matrix, coefficients, steps, eps):
        a, b, c = coefficients
        x = matrix / matrix.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    monkeypatch.setattr(theirs_module, "_zeropower_via_newtonschulz", orthogonalized)
    ours = by_trainer(
        folder, lr=1e-3, weight_decay=0.1, optimizer="muon", muon_momentum=0.95, muon_use_nesterov=nesterov, muon_split_qkv=False,
        muon_scale_mode="shape_scaling", muon_coefficient_type="simple",
        muon_fp32_matmul_prec="highest",
    )  # fmt: skip
    theirs = by_torch(
        folder,
        lambda p: torch.optim.Muon(
            [t for name, t in p.items() if is_matrix(name)], lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=nesterov
        ),
        lambda p: torch.optim.AdamW(groups({n: t for n, t in p.items() if not is_matrix(n)}, 0.1), lr=1e-3, betas=(0.9, 0.95)),
    )
    start = start_of(folder)
    matrices = {name: p for name, p in theirs.items() if is_matrix(name)}
    assert len(matrices) == 16
    assert distance(ours, matrices, start) < 2e-3
    assert distance(ours, {n: p for n, p in theirs.items() if n not in matrices}, start) < 2e-3


def test_muon_splits_fused_matrices(folder):
    """q, k, v and gate, up are orthogonal each for itself: the update of each has singular values near 1."""
    common = dict(
        lr=1e-2, weight_decay=0.0, optimizer="muon", muon_num_ns_steps=10, muon_coefficient_type="polar_express",
        muon_fp32_matmul_prec="highest", muon_scale_mode="unit_rms_norm",
    )  # fmt: skip
    models = build(folder)
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    ids, labels = tiny.rows(8, 24, seed=0)  # enough tokens for gradients of full rank
    mb.Trainer(models, lr_decay_style="constant", **common).train_step([dict(input_ids=ids, labels=labels)])
    after = dict(models[0].named_parameters())
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    update = (before[name] - after[name].detach()) / 1e-2
    gate, up = update.chunk(2)
    qkv = "decoder.layers.1.self_attention.linear_qkv.weight"
    update = (before[qkv] - after[qkv].detach()) / 1e-2
    q, k, v = (part.reshape(-1, 64) for part in update.view(4, -1, 64).split([24, 12, 12], dim=1))
    for part in (gate, up, q, k, v):
        values = torch.linalg.svdvals(part) / (part.shape[0] / part.shape[1]) ** 0.5
        assert (values.median() - 1).abs() < 1e-2 and values.max() < 1.01


@pytest.mark.parametrize("offload", [False, True])
def test_a_loss_above_the_limit_changes_nothing(folder, offload):
    options = dict(lr=1e-2, optimizer_cpu_offload=offload, optimizer_offload_fraction=0.5 if offload else 1.0)
    models = build(folder)
    trainer = mb.Trainer(models, lr_decay_style="constant", clip_grad=0.0, **options)
    results = [trainer.train_step([batch(0)])]
    results.append(trainer.train_step([batch(7)], loss_limit=results[0].loss / 2))
    results += [trainer.train_step([batch(step)], loss_limit=1e9) for step in range(1, STEPS)]
    assert [(one.skipped, one.spike) for one in results] == [(False, False), (True, True), *[(False, False)] * 3]
    assert results[-1].skipped_steps == 1 and results[-1].iteration == STEPS + 1
    for name, value in by_trainer(folder, **options).items():
        assert torch.equal(value, dict(models[0].named_parameters())[name]), name


def test_trainer_leaves_the_model_usable(folder):
    """After a trainer is gone, gradients go to .grad again and another trainer starts from the same weights."""
    models = build(folder)
    trainer = mb.Trainer(models, lr_decay_style="constant", data_parallel_sharding_strategy="optim_grads_params")
    trainer.train_step([batch(0)])
    ids = batch(0)["input_ids"]
    with torch.no_grad():
        logits = models[0](ids)
    with pytest.raises(RuntimeError, match="materialised"):
        next(iter(models[0].parameters())).sum()
    with mb.materialised(models):
        norm = sum(p.norm() for p in models[0].parameters())
        assert norm > 0
    del trainer
    trainer = mb.Trainer(models, lr_decay_style="constant")
    with torch.no_grad():
        assert torch.equal(models[0](ids), logits)
    del trainer
    models[0](ids, labels=batch(0)["labels"]).sum().backward()
    assert all(p.grad is not None for p in models[0].parameters())


@pytest.mark.parametrize(
    "options,text",
    [
        (dict(optimizer="lion"), "adam, sgd, muon"),
        (dict(optimizer="muon", data_parallel_sharding_strategy="optim_grads_params"), "whole matrices"),
        (dict(lr_mult={"nothing": 2.0}), "no trainable parameter"),
        (dict(exp_avg_sq_dtype="fp16"), "use bf16"),
        (dict(main_params_dtype="fp8"), "main_params_dtype"),
        (dict(overlap_param_gather=True, use_distributed_optimizer=False), "overlap_param_gather"),
    ],
)
def test_bad_options(folder, options, text):
    with pytest.raises(ValueError, match=text):
        mb.Trainer(build(folder), lr_decay_style="constant", **options)


def test_weights_written_between_steps_are_the_masters_of_remainders(folder):
    config = mb.ModelConfig(**mb.hf_to_mcore_config(folder), params_dtype="bfloat16")
    models = mb.get_mcore_model(config)
    config.bridge.load_weights(models, folder)
    trainer = mb.Trainer(models, lr=1e-2, lr_decay_style="constant", store_param_remainders=True)
    weight = models[0].decoder.final_layernorm.weight
    for _ in range(2):
        with torch.no_grad():
            weight.fill_(0.5)
        trainer.train_step([batch(0)])
        moved = (weight.detach().float() - 0.5).abs()
        assert 0 < moved.max() < 0.02


@pytest.mark.parametrize(
    "options",
    [dict(main_params_dtype="bf16"), dict(optimizer="muon"), dict(optimizer_cpu_offload=True)],
    ids=lambda o: next(iter(o)),
)
def test_remainders_need_masters_of_their_own(folder, options):
    with pytest.raises(ValueError, match="store_param_remainders"):
        mb.Trainer(build(folder), lr=1e-3, lr_decay_style="constant", store_param_remainders=True, **options)
