"""gpt_oss from MXFP4 files, through the command line and back."""

import json

import mcore_bridge as mb
import pytest
import tiny
import torch
from mcore_bridge.cli.main import main
from transformers import AutoModelForCausalLM

Mxfp4Config = pytest.importorskip("transformers").Mxfp4Config


def test_mxfp4_model(tmp_path):
    tiny.save("gpt_oss", tmp_path / "plain")
    arguments = ["export", "--model", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "packed"), "--quantize", "mxfp4"]
    assert main(arguments) in (0, None)
    text = json.loads((tmp_path / "packed/config.json").read_text())
    assert text["quantization_config"]["quant_method"] == "mxfp4"
    config = mb.ModelConfig(**mb.hf_to_mcore_config(str(tmp_path / "packed")))
    (model,) = mb.get_mcore_model(config)
    config.bridge.load_weights([model], tmp_path / "packed")
    hf_model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32, attn_implementation="eager"
    )
    ids, _ = tiny.rows(2, 20)
    with torch.no_grad():
        # Transformers dequantises to bfloat16, which holds every value of the format.
        assert tiny.relative(model(ids, None), hf_model(ids).logits) < 2e-5
    # What was loaded is on the format's grid: saved plain and packed again it has the same values.
    plain = {"config.json": (tmp_path / "plain/config.json").read_bytes()}
    config.bridge.save_weights([model], tmp_path / "saved", extra_files=plain)
    arguments = ["export", "--model", str(tmp_path / "saved"), "--output_dir", str(tmp_path / "again"), "--quantize", "mxfp4"]
    assert main(arguments) in (0, None)
    (other,) = mb.get_mcore_model(config)
    config.bridge.load_weights([other], tmp_path / "again")
    for (name, before), (_, after) in zip(model.named_parameters(), other.named_parameters()):
        assert torch.equal(before, after), name
