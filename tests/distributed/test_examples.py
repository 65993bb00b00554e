"""The examples run as their heads say: the Python loop on one and two processes, the C++ program against the installed library."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tiny
import torch
from launch import environment, launch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def word_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<eos>",
        "<unk>",
        "The",
        "bridge",
        "joins",
        "two",
        "sides",
        "of",
        "the",
        "river",
        ".",
        "A",
        "model",
        "is",
        "what",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder
    )


def test_python_loop(tmp_path):
    tiny.save("qwen3", tmp_path / "model")
    word_tokenizer(tmp_path / "model")
    losses = {}
    for processes in (1, 2):
        finished = launch([ROOT / "examples/python/train_loop.py", tmp_path / "model", tmp_path / f"out{processes}"], processes)
        assert finished.returncode == 0, finished.stderr[-3000:]
        losses[processes] = [float(x) for x in re.findall(r"loss ([\d.]+)", finished.stdout)]
    assert len(losses[1]) == 3 and losses[1][2] < losses[1][0]
    assert losses[1] == pytest.approx(losses[2], abs=2e-4)
    one, two = load_file(tmp_path / "out1/model.safetensors"), load_file(tmp_path / "out2/model.safetensors")
    for name, tensor in one.items():
        assert tiny.relative(two[name], tensor) < 1e-3, name


def test_cpp_program(tmp_path):
    """Installs the library and builds a program that finds it with find_package."""
    if not (ROOT / "build/CMakeCache.txt").exists():
        pytest.skip("no build folder (the package was installed with pip)")
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    env = {**environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*words):
        finished = subprocess.run([str(w) for w in words], env=env, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
        return finished.stdout

    run(cmake, "--install", ROOT / "build", "--prefix", tmp_path / "prefix")
    prefixes = f"{tmp_path / 'prefix'};{torch.utils.cmake_prefix_path}"
    run(
        cmake,
        "-S",
        ROOT / "examples/cpp",
        "-B",
        tmp_path / "build",
        "-G",
        "Ninja",
        f"-DCMAKE_PREFIX_PATH={prefixes}",
        "-DCMAKE_BUILD_TYPE=Debug",
    )
    run(cmake, "--build", tmp_path / "build")

    hf_model = tiny.save("llama3_biases_tied", tmp_path / "model")
    ids = [5, 17, 3, 42]
    output = run(tmp_path / "build/next_token", tmp_path / "model", *ids)
    with torch.no_grad():
        values, tokens = hf_model(torch.tensor([ids])).logits[0, -1].topk(5)
    rows = [line.split() for line in output.splitlines()]
    assert [int(token) for token, _ in rows] == tokens.tolist()
    assert [float(value) for _, value in rows] == pytest.approx(values.tolist(), rel=1e-4)

    finished = subprocess.run(
        [str(tmp_path / "build/next_token"), "/nowhere", "1"], env=env, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1 and "config.json" in finished.stderr


@pytest.mark.slow
def test_pip_install(tmp_path):
    """`pip install .` into a fresh environment that sees this one's packages; the engine, the command and the C++ package work."""
    target = tmp_path / "site"
    env = {**environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-build-isolation",
            "--no-deps",
            "--target",
            str(target),
            str(ROOT),
        ],
        env=env,
        check=True,
    )
    code = (
        "import mcore_bridge, json; from mcore_bridge.engine import _core; from pathlib import Path; "
        "print(json.dumps([mcore_bridge.__file__, len(mcore_bridge.config_fields()), "
        "Path(mcore_bridge.cmake_prefix_path, 'mcore_bridge', 'mcore_bridge-config.cmake').exists()]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    path, fields, package = json.loads(found.stdout)
    assert path.startswith(str(target)) and fields > 40 and package
    assert any(target.glob(f"mcore_bridge/_core{sysconfig.get_config_var('EXT_SUFFIX')}"))
