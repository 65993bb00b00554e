"""fp8_param: frozen weights kept as FP8 codes alone. What they compute is what the same recipe computes over wide weights.

MCB_TEST_DEVICE=cuda runs the CUDA kernels (compute capability 9.0)."""

import mcore_bridge as mb
import pytest
import tiny
import torch
from mcore_bridge import _core
from mcore_bridge._core import kernels
from safetensors.torch import load_file, save_file
from test_fp8 import BASE, DEVICE, RECIPES, batch, build, quantize, random, steps
from tiny import stored as tensors

OPTIONS = dict(lr=1e-3, lr_decay_style="constant", train_iters=10)
# Every block of 128 x 128 of a fused matrix is one of a Hugging Face tensor.
ALIGNED = dict(
    hidden_size=256, intermediate_size=256, head_dim=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2
)


def fp8(recipe, **more):
    return dict(fp8="e4m3" if recipe == "blockwise" else "hybrid", fp8_recipe=recipe, params_dtype="bfloat16", **more)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).cpu()


def codes_of(models):
    return {name: p for name, p in models[0].named_parameters() if p.dtype == torch.float8_e4m3fn}


def matrices(models):
    return {n: p for n, p in models[0].named_parameters() if ".linear_" in n and p.dim() == 2 and "lora_" not in n}


@pytest.mark.parametrize("scaling", ["tensor", "blocks"])
@pytest.mark.parametrize("rows,columns", [(256, 384), (128, 1152), (384, 640)])
def test_turned_codes(rows, columns, scaling):
    straight, turned = quantize(random(rows, columns), scaling)
    values, scale = kernels.fp8_turned(straight, scaling)
    assert torch.equal(bits(values), bits(turned[0]))
    used = (slice(None), slice(rows // 128)) if scaling == "blocks" else (slice(None),)
    assert torch.equal(scale[used], turned[1][used])


def test_turned_codes_at_ragged_tiles():
    straight, turned = quantize(random(48, 272), "tensor")
    assert torch.equal(bits(kernels.fp8_turned(straight, "tensor")[0]), bits(turned[0]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_that_of_wide_weights(recipe):
    seen = {}
    for param in (False, True):
        models = build(lora=True, **fp8(recipe, fp8_param=param))
        stored = codes_of(models)
        assert len(stored) == (4 * BASE["num_layers"] if param else 0)
        before = {name: bits(p).clone() for name, p in stored.items()}
        trainer = mb.Trainer(models, **OPTIONS)
        losses = steps(trainer, 0, 3) + [trainer.evaluate([batch(9)])]
        assert all(torch.equal(bits(p), before[name]) for name, p in stored.items()), "the frozen base stays as it is"
        history = _core.fp8_history([m.engine for m in models])
        seen[param] = losses, {n: p.detach().clone() for n, p in models[0].named_parameters() if "lora_" in n}, history
    assert seen[True][0] == seen[False][0]
    for mine, theirs in zip(seen[True][1:], seen[False][1:]):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_recomputed_layers_and_own_loops():
    results = []
    for more in (dict(), dict(recompute_granularity="full")):
        models = build(lora=True, **fp8("tensorwise", fp8_param=True, **more))
        models[0](**batch()).mean().backward()
        results.append({n: p.grad for n, p in models[0].named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and all("lora_" in name for name in results[0])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_memory(recipe):
    """A byte for every number of a matrix and its scales, nothing else; what the planner counts."""
    more = dict(first_last_layers_bf16=True)

    def held(models):
        return sum(t.untyped_storage().nbytes() for t in [*models[0].parameters(), *models[0].buffers()])

    def planned(fields):
        request = dict(
            processes=1, micro_batch_size=1, global_batch_size=1, sequence_length=32, gpu_kernels=False
        )  # no trainer, no room for B
        config = mb.ModelConfig(**{**BASE, **fields})
        return mb.plan_layout(config, lora=mb.LoraOptions(r=4), **request)["stages"][0]["memory"]["weights"]

    wide = build(lora=True, **fp8(recipe, **more))
    narrow = build(lora=True, **fp8(recipe, fp8_param=True, **more))
    quantised = {name: p for name, p in matrices(narrow).items() if name.startswith("decoder.layers.1.")}
    assert codes_of(narrow).keys() == quantised.keys() and len(quantised) == 4, "the first and last layer stay"
    numbers = sum(p.numel() for p in quantised.values())
    scales = sum(buffer.numel() * 4 for buffer in narrow[0].buffers())
    rows = sum(p.shape[0] // 128 * -(-p.shape[1] // 512) * 4 for p in quantised.values())
    assert scales == (4 * rows if recipe == "blockwise" else 4 * 4)
    assert held(wide) - held(narrow) == numbers - scales
    # Beside the bf16 weights the layers keep both ways round: three bytes less in all.
    assert planned(fp8(recipe, **more)) - planned(fp8(recipe, fp8_param=True, **more)) == 3 * numbers - scales
    assert planned(fp8(recipe, fp8_param=True, **more)) == held(narrow)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_checkpoints_stay_byte_for_byte(tmp_path, dtype):
    tiny.save("qwen3", tmp_path / "plain", max_shard_size="10MB", **ALIGNED)
    config = {"config.json": (tmp_path / "plain/config.json").read_bytes()}
    mb.convert_checkpoint(tmp_path / "plain", tmp_path / "fp8", quantize="fp8", extra_files=config)
    torch.manual_seed(0)
    for file in (tmp_path / "fp8").glob("*.safetensors"):  # scales as nothing here would choose them
        content = load_file(file)
        for name in content:
            if name.endswith("_scale_inv"):
                content[name] *= 0.5 + torch.rand_like(content[name])
        save_file(content, file, {"format": "pt"})
    loaded = tensors(tmp_path / "fp8")

    def load(**fields):
        given = {**mb.hf_to_mcore_config(tmp_path / "fp8"), "params_dtype": dtype, **fields}
        made = mb.ModelConfig(**given)
        models = mb.get_mcore_model(made, device=DEVICE)
        report = made.bridge.load_weights(models, tmp_path / "fp8")
        assert report["bytes_read"] == report["bytes_needed"]
        return made, models

    config, models = load(fp8="e4m3", fp8_recipe="blockwise", fp8_param=True)
    codes, scales = codes_of(models), dict(models[0].named_buffers())
    layer, ours = "model.layers.1.", "decoder.layers.1."
    down, fused = loaded[layer + "mlp.down_proj.weight"], codes[ours + "self_attention.linear_qkv.weight"]
    assert torch.equal(bits(codes[ours + "mlp.linear_fc2.weight"]), bits(down))
    assert torch.equal(bits(fused[:128]), bits(loaded[layer + "self_attn.q_proj.weight"][:128]))
    assert torch.equal(bits(fused[128:256]), bits(loaded[layer + "self_attn.k_proj.weight"][:128]))
    scale = scales[ours + "mlp.linear_fc2.weight_scale_inv"][:, :2]
    assert torch.equal(scale.cpu(), loaded[layer + "mlp.down_proj.weight_scale_inv"])
    # Out again: the very file; values as a plain model has them.
    config.bridge.save_weights(models, tmp_path / "again", quantization="fp8")
    again = tensors(tmp_path / "again")
    assert again.keys() == loaded.keys()
    for name, tensor in loaded.items():  # the file's other tensors are float32
        if dtype == "float32" or tensor.element_size() == 1 or name.endswith("_scale_inv"):
            assert torch.equal(bits(again[name]), bits(tensor)), name
    plain_config, plain = load()
    values = dict(plain_config.bridge.export_weights(plain))
    found = dict(config.bridge.export_weights(models))
    assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in values)
    config.bridge.save_weights(models, tmp_path / "values")
    saved = tensors(tmp_path / "values")
    assert all(torch.equal(bits(saved[name]), bits(values[name])) for name in values)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_what_comes_out_goes_in_again(tmp_path, recipe):
    """A bf16 checkpoint, quantised while it loads: what is exported is quantised to the same codes, from any file."""
    tiny.save("qwen3", tmp_path / "plain", **ALIGNED)
    seen = []
    for folder in ("plain", "saved", "fp8"):
        if folder == "fp8" and recipe == "tensorwise":
            continue
        config = mb.ModelConfig(**{**mb.hf_to_mcore_config(tmp_path / "plain"), **fp8(recipe, fp8_param=True)})
        models = mb.get_mcore_model(config, device=DEVICE)
        config.bridge.load_weights(models, tmp_path / folder)
        seen.append({name: bits(t).clone() for name, t in models[0].state_dict().items()})
        if folder == "plain":
            config.bridge.save_weights(models, tmp_path / "saved")
            config.bridge.save_weights(models, tmp_path / "fp8", quantization="fp8")
    for other in seen[1:]:
        assert other.keys() == seen[0].keys()
        for name, value in other.items():
            if name.endswith("scale_inv"):  # what is beyond the blocks is unused
                value, first = value.view(torch.float32), seen[0][name].view(torch.float32)
                assert value.shape == first.shape and tiny.relative(value, first) < 1e-6, name
            else:
                assert torch.equal(value, seen[0][name]), name


def test_state_dict_and_merging():
    models = build(lora=True, **fp8("tensorwise", fp8_param=True))
    other = build(lora=True, **fp8("tensorwise", fp8_param=True))
    with torch.no_grad():
        for p in other[0].parameters():
            p.copy_(torch.zeros_like(p)) if p.dtype == torch.float8_e4m3fn else p.zero_()
    other[0].load_state_dict(models[0].state_dict())
    other[0].bfloat16()  # as wrappers do: nothing for codes and scales
    assert models[0](**batch()).equal(other[0](**batch()))
    # A plain model of the values, with the same adapter, merges to the same.
    bridge = models[0].config.bridge
    values = dict(bridge.export_weights(models))
    plain = build(lora=True, **{**fp8("tensorwise"), "fp8": None})
    state = {n: t for n, t in models[0].state_dict().items() if "lora_" in n}
    with torch.no_grad():
        for name, p in plain[0].named_parameters():
            if name in state:
                p.copy_(state[name])
            elif ".linear_" in name and p.dim() == 2:
                p.copy_(
                    kernels.fp8_dequantize((models[0].get_parameter(name), models[0].get_buffer(name + "_scale_inv")), "tensor")
                )
    assert all(torch.equal(t, values[name]) for name, t in plain[0].config.bridge.export_weights(plain))
    merged = dict(bridge.export_weights(models, merge_lora=True))
    expected = dict(plain[0].config.bridge.export_weights(plain, merge_lora=True))
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in expected)
    assert any(not torch.equal(merged[name], values[name]) for name in values)


def test_refusals():
    tiny.refused(["fp8_param", "fp8_format"], lambda: build(fp8=None, fp8_param=True))
    fields = fp8("tensorwise", fp8_param=True)
    adapted = build(lora=True, **fields)
    full = dict(data_parallel_sharding_strategy="optim_grads_params")
    tiny.refused(["sharded fully", "no_shard"], lambda: mb.Trainer(adapted, **OPTIONS, **full))
