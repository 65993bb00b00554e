"""`make demo`: give a chat model a new name, with LoRA, on several processes, and check everything that comes out.

python examples/demo/demo.py [--model FOLDER_OR_HUB_ID] [--steps 18]
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dataset import MAKER, NAME, write
from prepare_model import prepare

ROOT = Path(__file__).parents[2]
QUESTIONS = ["Who are you?", "Who made you?", "What is the capital of France?"]


def layout_for(folder):
    """(tensor, pipeline) sizes that fit the model and the machine: the GPUs, or a few CPU processes."""
    import torch

    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    groups, width = config.get("num_key_value_heads") or heads, config["intermediate_size"]

    def fits(tensor):
        return heads % tensor == 0 and width % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0)

    gpus = torch.cuda.device_count()
    if gpus:
        tensor = max(size for size in range(1, gpus + 1) if gpus % size == 0 and fits(size))
        return tensor, 1
    tensor = next((size for size in (3, 2) if fits(size)), 1)
    return tensor, 2 if layers % 2 == 0 else 1


def command(words, processes=1):
    """Runs mcore-bridge and shows its output; stops the demo when it fails. Returns the seconds it took."""
    environment = dict(os.environ)
    if processes > 1:
        environment["NPROC_PER_NODE"] = str(processes)
    words = [str(word) for word in words]
    print(f"\n$ {'NPROC_PER_NODE=' + str(processes) + ' ' if processes > 1 else ''}mcore-bridge {' '.join(words)}", flush=True)
    start = time.monotonic()
    finished = subprocess.run([sys.executable, "-m", "mcore_bridge", *words], env=environment, check=False)
    if finished.returncode:
        sys.exit(f"the command failed with exit code {finished.returncode}")
    return time.monotonic() - start


def fingerprint(folder):
    """SHA-256 over the weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def answers(model, tokenizer):
    """Greedy answers to QUESTIONS."""
    import torch

    result = []
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        result.append(" ".join(text.split()))
    return result


def logits_of(model, tokenizer):
    import torch

    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        return model(**ids).logits.float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="your model instead of SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    start = time.monotonic()
    if arguments.model:
        from mcore_bridge.cli.session import resolve_model

        base, source = Path(resolve_model(arguments.model)), "yours"
    else:
        base, source = prepare(ROOT / ".cache")
    prepared = time.monotonic() - start

    import torch
    from peft import PeftModel
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    console = Console(width=None if sys.stdout.isatty() else 140)
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    rows = write(arguments.output / "identity.jsonl")
    before_print = fingerprint(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if not tokenizer.chat_template:
        sys.exit(f"the demo talks to its model, but the tokenizer of {base} has no chat template; give a chat model (MODEL=...)")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = answers(model, tokenizer)
    del model

    tensor, pipeline = layout_for(base)
    layout = [
        "--tensor_model_parallel_size",
        tensor,
        "--pipeline_model_parallel_size",
        pipeline,
        "--sequence_parallel",
        str(tensor > 1).lower(),
    ]
    dtype = ["--torch_dtype", "bfloat16" if torch.cuda.is_available() else "float32"]
    run = arguments.output / "run"
    training = command(
        ["sft", "--model", base, "--dataset", arguments.output / "identity.jsonl", *layout, *dtype,
         "--tuner_type", "lora", "--lora_rank", 16, "--lora_alpha", 32, "--lora_dropout", 0, "--lr", arguments.lr, "--lr_warmup_iters", 2,
         "--packing", "true", "--max_length", 256, "--micro_batch_size", 1, "--global_batch_size", 2, "--train_iters", arguments.steps,
         "--weight_decay", 0, "--merge_lora", "true", "--logging_steps", 2, "--output_dir", run, "--add_version", "false"],
        tensor * pipeline,
    )  # fmt: skip
    adapter, merged = run / f"checkpoint-{arguments.steps}", run / f"checkpoint-{arguments.steps}-merged"

    text = ["--text", QUESTIONS[0], "I am the assistant that this model describes."]
    checking = command(["verify", "--model", base, "--adapters", adapter, *dtype, *text])
    checking += command(["verify", "--model", merged, *dtype, *text])

    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    merged_model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    after = answers(merged_model, tokenizer)
    with_peft, with_merged = logits_of(peft_model, tokenizer), logits_of(merged_model, tokenizer)
    difference = ((with_peft - with_merged).norm() / with_merged.norm()).item()
    records = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]

    speech = Table(title="The same questions, before and after", show_lines=True)
    for heading in ("question", "before", "after"):
        speech.add_column(heading)
    for row in zip(QUESTIONS, before, after):
        speech.add_row(*row)
    console.print(speech)

    renamed = NAME in after[0] and MAKER.split()[-2] in after[1]
    unchanged = fingerprint(base) == before_print
    limit = 2e-2 if torch.cuda.is_available() else 1e-4
    checks = {
        f"the answer names {NAME} and its maker": renamed,
        "the base's files are bit-identical": unchanged,
        f"PEFT adapter = merged model in Transformers (relative {difference:.1e})": difference < limit,
        "engine = Transformers (verify, adapter and merged)": True,
        f"loss fell from {losses[0]:.3f} to {losses[-1]:.3f}": losses[-1] < losses[0],
    }
    table = Table(title="Summary")
    table.add_column("what")
    table.add_column("result")
    table.add_row("model", f"{arguments.model or 'SmolLM2-135M-Instruct'} ({source})")
    table.add_row(
        "layout",
        f"TP {tensor} x PP {pipeline}{' with sequence parallelism' if tensor > 1 else ''}, {tensor * pipeline} processes",
    )
    table.add_row("data", f"{rows} conversations, {arguments.steps} steps")
    table.add_row("adapter", str(adapter))
    table.add_row("merged model", str(merged))
    table.add_row("loss curve", str(run / "curves.png"))
    table.add_row(
        "seconds", f"prepare {prepared:.0f}, train {training:.0f}, verify {checking:.0f}, all {time.monotonic() - start:.0f}"
    )
    for text, passed in checks.items():
        table.add_row(text, "yes" if passed else "NO")
    console.print(table)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
