"""Quantised checkpoints and offline conversion against Transformers' own code, float64 closed forms and the files' bytes."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from mcore_bridge.bridge import convert_checkpoint, diff_checkpoints
from safetensors.torch import save_file
from tiny import stored as tensors


def raw(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def folder_of(path, content, config=None):
    path.mkdir(parents=True, exist_ok=True)
    save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config or {"model_type": "something", "torch_dtype": "bfloat16"}))
    return path


def convert(source, target, **options):
    files = {"config.json": (source / "config.json").read_bytes()}
    report = convert_checkpoint(source, target, extra_files=files, **options)
    return tensors(target), json.loads((target / "config.json").read_text()), report


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}


def closed_form_fp8(weight, scale, block=128):
    """float64: every element times its own block's number."""
    rows = torch.arange(weight.shape[-2]) // block
    cols = torch.arange(weight.shape[-1]) // block
    return weight.double() * scale.double()[..., rows[:, None], cols[None, :]]


def random_fp8(*shape):
    bits = torch.randint(0, 256, shape, dtype=torch.uint8)
    return bits.masked_fill((bits & 0x7F) == 0x7F, 0).view(torch.float8_e4m3fn)  # no NaN


@pytest.mark.parametrize("shape", [(256, 384), (130, 257), (5, 3), (128, 128), (3, 130, 140)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_dequantised_has_each_blocks_own_scale(tmp_path, shape, scale_dtype):
    torch.manual_seed(0)
    weight = random_fp8(*shape)
    scale = (torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)) + 0.5).to(scale_dtype)
    name = "model.layers.0.self_attn.q_proj.weight"
    source = folder_of(
        tmp_path / "a", {name: weight, name + "_scale_inv": scale}, {"model_type": "x", "quantization_config": FP8}
    )
    result, config, _ = convert(source, tmp_path / "b", dequantize=True, torch_dtype="float32")
    assert list(result) == [name] and "quantization_config" not in config
    expected = closed_form_fp8(weight, scale)
    assert torch.equal(result[name], expected.float())  # one rounding
    result, _, _ = convert(source, tmp_path / "c", dequantize=True)
    assert torch.equal(result[name], expected.float().bfloat16())


def test_fp8_agrees_with_transformers_in_both_directions(tmp_path):
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(finegrained, "Fp8Quantize"):
        pytest.skip("this version of Transformers has no Fp8Quantize")
    from types import SimpleNamespace

    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[128, 128], scale_fmt="float"))
    torch.manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    for index, dtype in enumerate((torch.float32, torch.bfloat16)):
        weight = (torch.randn(384, 256) * torch.logspace(-6, 3, 256)).to(dtype)
        weight[:128, :128] = 0
        source = folder_of(tmp_path / f"a{index}", {name: weight})
        ours, config, _ = convert(source, tmp_path / f"b{index}", quantize="fp8")
        theirs = finegrained.Fp8Quantize(quantizer).convert({name: weight})
        assert same_bits(ours[name], theirs[name])
        assert same_bits(ours[name + "_scale_inv"], theirs[name + "_scale_inv"])
        assert config["quantization_config"]["quant_method"] == "fp8"
        back, _, _ = convert(tmp_path / f"b{index}", tmp_path / f"c{index}", dequantize=True, torch_dtype="float32")
        assert same_bits(back[name], finegrained.Fp8Dequantize(quantizer)._dequantize_one(*theirs.values()))


@pytest.mark.parametrize("shape", [(200, 300), (1, 1), (129, 128)])
def test_fp8_ragged_blocks_are_quantised_within_half_a_step(tmp_path, shape):
    torch.manual_seed(1)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = torch.randn(shape)
    source = folder_of(tmp_path / "a", {name: weight})
    result, _, _ = convert(source, tmp_path / "b", quantize="fp8")
    scale = result[name + "_scale_inv"]
    assert list(scale.shape) == [-(-shape[0] // 128), -(-shape[1] // 128)]
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            assert scale[i, j].item() == pytest.approx(block.abs().max().item() / 448, rel=3e-7)
    # e4m3 keeps 3 bits after the point: half a step is 1/16 of the value, or half of the smallest step (2^-9).
    error = (closed_form_fp8(result[name], scale) - weight).abs()
    bound = torch.maximum(weight.abs().double() / 16, closed_form_fp8(torch.full(shape, 2.0**-10), scale))
    assert (error <= bound * 1.000001).all()


def fp8_model(path):
    """A published-like FP8 checkpoint of a small unknown model, in two shards."""
    torch.manual_seed(2)
    content = {
        "model.embed_tokens.weight": torch.randn(50, 130).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": random_fp8(260, 130),
        "model.layers.0.self_attn.q_proj.weight_scale_inv": torch.rand(3, 2) * 1e-3,
        "model.layers.0.mlp.gate.weight": torch.randn(8, 130),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(8),
        "model.norm.weight": torch.ones(130).bfloat16(),
        "lm_head.weight": torch.randn(50, 130).bfloat16(),
        "some.counter": torch.tensor(7),
    }
    folder_of(path, content, {"model_type": "unknown_to_all", "torch_dtype": "bfloat16", "quantization_config": FP8})
    return content


def test_untouched_tensors_keep_bytes_and_scales(tmp_path):
    content = fp8_model(tmp_path / "a")
    result, config, report = convert(tmp_path / "a", tmp_path / "b", max_shard_size="20KB")
    assert result.keys() == content.keys() and all(same_bits(result[name], content[name]) for name in content)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2 and config["quantization_config"] == FP8
    assert report["copied"] == report["tensors"] == len(content)
    difference = diff_checkpoints(tmp_path / "a", tmp_path / "b")
    assert all(row["identical"] for row in difference["tensors"]) and not difference["missing"]
    # A cast leaves quantised weights, their scales, whole numbers and the router's correction alone.
    result, config, _ = convert(tmp_path / "a", tmp_path / "c", torch_dtype="float16")
    assert config["torch_dtype"] == "float16"
    for name, tensor in result.items():
        cast = name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight")
        assert same_bits(tensor, content[name].half() if cast else content[name]), name


def adapter(path, shapes, rank=4, **config):
    """A PEFT adapter on {module: (rows, cols)}; returns {module: scaling * B A in float64}."""
    torch.manual_seed(3)
    content, deltas = {}, {}
    for module, (rows, cols) in shapes.items():
        a, b = torch.randn(rank, cols), torch.randn(rows, rank)
        content[f"base_model.model.{module}.lora_A.weight"] = a
        content[f"base_model.model.{module}.lora_B.weight"] = b
        deltas[module] = b.double() @ a.double()
    path.mkdir()
    save_file(content, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return deltas


def test_merging_into_fp8_quantises_what_it_touches_and_nothing_else(tmp_path):
    content = fp8_model(tmp_path / "a")
    module = "model.layers.0.self_attn.q_proj"
    deltas = adapter(tmp_path / "adapter", {module: (260, 130)}, use_rslora=True)
    before = (tmp_path / "a/model.safetensors").read_bytes()
    result, config, report = convert(tmp_path / "a", tmp_path / "b", adapter=tmp_path / "adapter")
    weight, scale = f"{module}.weight", f"{module}.weight_scale_inv"
    for name in content.keys() - {weight, scale}:
        assert same_bits(result[name], content[name]), name
    assert report["tensors"] - report["copied"] == 2 and config["quantization_config"] == FP8
    merged = closed_form_fp8(content[weight], content[scale]) + deltas[module] * 8 / 4**0.5
    error = (closed_form_fp8(result[weight], result[scale]) - merged).abs()
    assert (error <= merged.abs() / 16 + closed_form_fp8(torch.full((260, 130), 2.0**-9), result[scale])).all()
    # Dequantised, it is the sum itself.
    result, _, _ = convert(tmp_path / "a", tmp_path / "c", adapter=tmp_path / "adapter", dequantize=True, torch_dtype="float32")
    assert tiny.relative(result[weight], merged) < 1e-6
    assert (tmp_path / "a/model.safetensors").read_bytes() == before


def test_merge_agrees_with_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.save("qwen2", tmp_path / "a", tie_word_embeddings=True)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "v_proj", "down_proj"],
        alpha_pattern={"layers.1.self_attn.q_proj": 5},
        rank_pattern={"v_proj": 2},
        modules_to_save=["lm_head"],
    )
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    result, content, _ = convert(tmp_path / "a", tmp_path / "b", adapter=tmp_path / "adapter")
    expected = dict(tuned.merge_and_unload().state_dict())
    assert content["tie_word_embeddings"] is False  # the output layer was trained apart
    assert result.keys() == expected.keys() | {"lm_head.weight"}
    for name, tensor in result.items():
        assert tiny.relative(tensor, expected[name]) < 1e-6, name


def test_adapters_that_cannot_be_merged_say_why(tmp_path):
    fp8_model(tmp_path / "a")
    module = "model.layers.0.self_attn.q_proj"
    cases = {
        "dora": (dict(use_dora=True), ValueError, "use_dora"),
        "bias": (dict(bias="all"), ValueError, "bias"),
        "kind": (dict(peft_type="IA3"), ValueError, "IA3"),
    }
    for name, (config, error, text) in cases.items():
        adapter(tmp_path / name, {module: (260, 130)}, **config)
        with pytest.raises(error, match=text):
            convert(tmp_path / "a", tmp_path / f"{name}-out", adapter=tmp_path / name)
    adapter(tmp_path / "other", {"model.layers.9.self_attn.q_proj": (260, 130)})
    with pytest.raises(KeyError, match="another model's adapter"):
        convert(tmp_path / "a", tmp_path / "out", adapter=tmp_path / "other")
    adapter(tmp_path / "shape", {module: (256, 130)})
    with pytest.raises(ValueError, match="does not fit"):
        convert(tmp_path / "a", tmp_path / "out", adapter=tmp_path / "shape")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def gpt_oss(path):
    torch.manual_seed(4)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 4), dtype=torch.uint8)
    scales[0, 0, :2] = torch.tensor([0, 252], dtype=torch.uint8)
    prefix = "model.layers.0.mlp.experts."
    content = {
        prefix + "gate_up_proj_blocks": blocks,
        prefix + "gate_up_proj_scales": scales,
        prefix + "gate_up_proj_bias": torch.randn(3, 10).bfloat16(),
        "model.layers.0.mlp.router.weight": torch.randn(3, 128).bfloat16(),
        "model.embed_tokens.weight": torch.randn(20, 128).bfloat16(),
    }
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]}}
    folder_of(path, content, config)
    return content, prefix + "gate_up_proj"


def test_mxfp4_is_dequantised_bit_for_bit_as_transformers_does(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    content, name = gpt_oss(tmp_path / "a")
    result, config, _ = convert(tmp_path / "a", tmp_path / "b", dequantize=True)
    expected = mxfp4.convert_moe_packed_tensors(content[name + "_blocks"], content[name + "_scales"])
    assert same_bits(result[name], expected) and "quantization_config" not in config
    assert same_bits(result[name + "_bias"], content[name + "_bias"])
    # Out again: the values stay, and a second round changes no byte.
    again, config, _ = convert(tmp_path / "b", tmp_path / "c", quantize="mxfp4")
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert again.keys() == content.keys()
    back, _, _ = convert(tmp_path / "c", tmp_path / "d", dequantize=True)
    assert torch.equal(back[name], result[name])
    third, _, _ = convert(tmp_path / "d", tmp_path / "e", quantize="mxfp4")
    assert all(same_bits(third[key], again[key]) for key in again)
    # Untouched, the bytes are copied.
    copied, _, _ = convert(tmp_path / "a", tmp_path / "f")
    assert all(same_bits(copied[key], content[key]) for key in content)


def test_mxfp4_rounds_to_the_nearest_code(tmp_path):
    torch.manual_seed(5)
    name = "model.layers.0.mlp.experts.down_proj"
    weight = torch.randn(2, 64, 7)
    source = folder_of(tmp_path / "a", {name: weight})
    convert(source, tmp_path / "b", quantize="mxfp4")
    result, _, _ = convert(tmp_path / "b", tmp_path / "c", dequantize=True, torch_dtype="float32")
    codes = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    groups = weight.double().transpose(1, 2).reshape(2, 7, 2, 32)
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 6)))
    sizes = (groups / scale).abs()
    nearest = codes[(sizes[..., None] - codes).abs().argmin(-1)] * groups.sign() * scale
    assert torch.equal(result[name].double(), nearest.reshape(2, 7, 64).transpose(1, 2))


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "modelopt", "fbgemm_fp8", "novel"])
def test_other_methods_are_refused_by_name(tmp_path, method):
    source = folder_of(
        tmp_path / "a", {"w.weight": torch.zeros(2, 2)}, {"model_type": "x", "quantization_config": {"quant_method": method}}
    )
    with pytest.raises(ValueError, match="quantised with.*checkpoint"):
        convert(source, tmp_path / "b")


@pytest.mark.parametrize("name", ["m.qweight", "m.qzeros", "m.weight_packed", "m.weight.absmax", "m.SCB", "m.weight_scale_2"])
def test_other_methods_are_refused_by_their_tensors(tmp_path, name):
    source = folder_of(tmp_path / "a", {name: torch.zeros(2, 2), "m.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="not read by this version"):
        convert(source, tmp_path / "b")


def test_bad_requests_say_what_to_do(tmp_path):
    content = fp8_model(tmp_path / "a")
    with pytest.raises(ValueError, match="no tensor of the checkpoint"):
        convert(tmp_path / "a", tmp_path / "b", quantize="mxfp4", dequantize=True)
    with pytest.raises(ValueError, match="add dequantize"):
        convert(tmp_path / "a", tmp_path / "b", quantize="mxfp4")
    with pytest.raises(ValueError, match="quantization 'int4'"):
        convert(tmp_path / "a", tmp_path / "b", quantize="int4")
    name = "model.layers.0.self_attn.q_proj.weight"
    folder_of(
        tmp_path / "short",
        {name: content[name], name + "_scale_inv": torch.ones(2, 2)},
        {"model_type": "x", "quantization_config": FP8},
    )
    with pytest.raises(ValueError, match="needs \\[3, 2\\]"):
        convert(tmp_path / "short", tmp_path / "b")
    folder_of(tmp_path / "lonely", {name + "_scale_inv": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="has no weight"):
        convert(tmp_path / "lonely", tmp_path / "b")
    folder_of(tmp_path / "nan", {"a.b.weight": torch.full((3, 3), float("nan"))})
    with pytest.raises(FloatingPointError, match="a.b.weight"):
        convert(tmp_path / "nan", tmp_path / "b", quantize="fp8")
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".*"))


def test_a_stopped_export_leaves_the_old_state(tmp_path):
    fp8_model(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}

    def stop(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", dequantize=True, progress=stop)
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    assert not list(tmp_path.glob(".*"))


def test_quantised_model_loads_in_transformers(tmp_path):
    """An exported FP8 model means what Transformers makes of it."""
    from transformers import AutoModelForCausalLM

    fp8_config = pytest.importorskip("transformers").FineGrainedFP8Config
    tiny.save("qwen3", tmp_path / "a", hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=2)
    result, config, _ = convert(tmp_path / "a", tmp_path / "b", quantize="fp8")
    left = config["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in left and not any("q_proj" in name for name in left)
    assert result["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert result["model.embed_tokens.weight"].dtype == result["lm_head.weight"].dtype == torch.float32
    try:
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "b", quantization_config=fp8_config(dequantize=True), dtype=torch.float32
        ).eval()
    except (RuntimeError, ValueError, ImportError) as error:
        pytest.skip(f"Transformers does not dequantise here: {error}")
    convert(tmp_path / "b", tmp_path / "c", dequantize=True, torch_dtype="float32")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32).eval()
    ids, _ = tiny.rows(1, 12)
    with torch.no_grad():
        assert tiny.relative(ours(ids).logits, theirs(ids).logits) < 1e-6


def test_diff_counts_what_differs(tmp_path):
    content = fp8_model(tmp_path / "a")
    changed = dict(content)
    changed["model.norm.weight"] = content["model.norm.weight"] + 1
    changed["some.counter"] = torch.tensor(8)
    changed["extra.weight"] = changed.pop("lm_head.weight")
    changed["model.layers.0.mlp.gate.weight"] = torch.randn(4, 130)
    changed["model.layers.0.mlp.gate.e_score_correction_bias"] = torch.full((8,), float("nan"))
    folder_of(tmp_path / "b", changed, json.loads((tmp_path / "a/config.json").read_text()))
    result = diff_checkpoints(tmp_path / "a", tmp_path / "b")
    rows = {row["name"]: row for row in result["tensors"]}
    assert result["missing"] == ["lm_head.weight"] and result["extra"] == ["extra.weight"]
    assert result["wrong_shape"] == [{"name": "model.layers.0.mlp.gate.weight", "a": [8, 130], "b": [4, 130]}]
    assert rows["model.norm.weight"]["max_abs"] == 1 and rows["model.norm.weight"]["relative"] == 1
    assert not rows["some.counter"]["identical"] and "max_abs" not in rows["some.counter"]
    assert rows["model.layers.0.mlp.gate.e_score_correction_bias"]["relative"] is None
    assert sum(not row["identical"] for row in rows.values()) == 3
    # By value: a dequantised copy is equal, without asking it is not even of the same tensors.
    convert(tmp_path / "a", tmp_path / "plain", dequantize=True, torch_dtype="float32")
    assert diff_checkpoints(tmp_path / "a", tmp_path / "plain")["missing"]
    by_value = diff_checkpoints(tmp_path / "a", tmp_path / "plain", dequantize=True)
    assert all(row["identical"] for row in by_value["tensors"]) and not by_value["missing"] + by_value["extra"]


def mcore_bridge(*words):
    return subprocess.run([sys.executable, "-m", "mcore_bridge", *map(str, words)], capture_output=True, text=True)


def test_commands(tmp_path):
    tiny.save("qwen3", tmp_path / "a")
    done = mcore_bridge("export", "--model", tmp_path / "a", "--quantize", "fp8", "--output_dir", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert mcore_bridge("diff", tmp_path / "a", tmp_path / "a").returncode == 0
    one = mcore_bridge("diff", tmp_path / "a", tmp_path / "b", "--dequantize", "true")
    assert one.returncode == 1 and "28 differ" in one.stdout, one.stdout + one.stderr
    assert mcore_bridge("diff", tmp_path / "a", tmp_path / "b", "--dequantize", "true", "--tolerance", 0.05).returncode == 0
    content = json.loads(mcore_bridge("diff", tmp_path / "a", tmp_path / "b", "--json", "true").stdout)
    assert not content["equal"] and len(content["extra"]) == 28
    assert "FP8" in mcore_bridge("inspect", tmp_path / "b").stdout


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A child quantises 400 MB; it may not hold them."""
    folder = tmp_path / "a"
    folder.mkdir()
    step = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(2048, 2048).bfloat16() for i in range(48)}
    save_file(step, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    script = f"""
import resource
from mcore_bridge.bridge import convert_checkpoint, diff_checkpoints
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint({str(folder)!r}, {str(tmp_path / "b")!r}, quantize="fp8", max_shard_size="100MB")
diff_checkpoints({str(folder)!r}, {str(tmp_path / "b")!r}, dequantize=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 < 150, f"{int(done.stdout) / 1024:.0f} MiB for a model of 400 MB"


def test_full_disk_leaves_nothing(tmp_path):
    fp8_model(tmp_path / "a")
    script = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
from mcore_bridge.bridge import convert_checkpoint
try:
    convert_checkpoint({str(tmp_path / "a")!r}, {str(tmp_path / "b")!r})
except OSError as error:
    print("OSError", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "OSError" in done.stdout and "cannot be written" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".*"))
