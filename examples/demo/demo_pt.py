"""`make demo-pt`: pre-train a small Qwen3-type model from random weights on Python's own library sources, TP 2 x PP 2.

python examples/demo/demo_pt.py [--steps 40]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = ["argparse", "ast", "bisect", "calendar", "codecs", "collections/__init__", "configparser", "contextlib", "copy", "csv", "dataclasses",
           "datetime", "difflib", "enum", "fractions", "functools", "glob", "gzip", "heapq", "inspect", "json/decoder", "json/encoder",
           "logging/__init__", "os", "pathlib", "pickle", "random", "shutil", "statistics", "string", "subprocess", "tarfile", "tempfile",
           "textwrap", "threading", "typing", "uuid", "zipfile"]  # fmt: skip


def sources():
    """Texts of the standard library's modules that this Python has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8") for name in MODULES if (path := library / f"{name}.py").exists()]


def make_model(folder, texts, vocabulary=4096):
    """config.json and a byte-level BPE tokenizer trained on `texts`; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])
    wrapped.save_pretrained(folder)
    Qwen3Config(
        architectures=["Qwen3ForCausalLM"], vocab_size=len(wrapped), hidden_size=192, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=wrapped.eos_token_id, pad_token_id=wrapped.pad_token_id,
    ).save_pretrained(folder)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo_pt")
    arguments = parser.parse_args()
    start = time.monotonic()
    shutil.rmtree(arguments.output, ignore_errors=True)
    model, run = arguments.output / "model", arguments.output / "run"
    model.mkdir(parents=True)
    texts = sources()
    make_model(model, texts)
    data = arguments.output / "library.jsonl"
    # Pieces of a few hundred lines, so that the tokens of a row come from several modules.
    pieces = [
        "\n".join(lines[at : at + 60]) for text in texts for lines in [text.splitlines()] for at in range(0, len(lines), 60)
    ]
    data.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    words = ["pt", "--model", model, "--dataset", data, "--perform_initialization", "true", "--torch_dtype", "float32",
             "--tensor_model_parallel_size", 2, "--pipeline_model_parallel_size", 2, "--sequence_parallel", "true",
             "--packing", "true", "--max_length", 512, "--truncation_strategy", "right", "--micro_batch_size", 1, "--global_batch_size", 4,
             "--train_iters", arguments.steps, "--lr", 3e-3, "--lr_warmup_iters", 5, "--min_lr", 3e-4, "--split_dataset_ratio", 0.02,
             "--eval_steps", arguments.steps // 2, "--output_dir", run, "--add_version", "false"]  # fmt: skip
    words = [str(word) for word in words]
    print(f"$ NPROC_PER_NODE=4 mcore-bridge {' '.join(words)}", flush=True)
    finished = subprocess.run(
        [sys.executable, "-m", "mcore_bridge", *words], env={**os.environ, "NPROC_PER_NODE": "4"}, check=False
    )
    if finished.returncode:
        return finished.returncode

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = run / f"checkpoint-{arguments.steps}"
    trained = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = "    def __init__(self"
    with torch.no_grad():
        output = trained.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=False)
    losses = [
        record["loss"] for line in (run / "logging.jsonl").read_text().splitlines() if "loss" in (record := json.loads(line))
    ]
    print(f"\nTransformers opens {checkpoint} and continues:\n{tokenizer.decode(output[0])}\n")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; curves: {run / 'curves.png'}; {time.monotonic() - start:.0f} s in all")
    return 0 if losses[-1] < losses[0] - 1 else 1


if __name__ == "__main__":
    sys.exit(main())
