"""Loss curves of FP8 against bf16 (or fp32 on a CPU): a small Qwen3 learns, byte by byte, the Python files that come with torch.

    python benchmarks/fp8_loss.py [--device cuda] [--steps 300] [--runs bf16 tensorwise delayed blockwise]

The same seed, data and order in every run; prints the mean loss of every tenth of the steps and of held-out text at the end."""

import argparse
import sys
import time
from pathlib import Path

import mcore_bridge as mb
import torch

RUNS = {
    "bf16": {},
    "tensorwise": dict(fp8="hybrid", fp8_recipe="tensorwise"),
    "delayed": dict(fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=16),
    "blockwise": dict(fp8="e4m3", fp8_recipe="blockwise"),
}


def text(length):
    files = sorted(Path(torch.__file__).parent.rglob("*.py"))
    data, size = [], 0
    for file in files:
        data.append(file.read_bytes())
        size += len(data[-1])
        if size > length:
            break
    return torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8)


def train(fields, arguments, data):
    wide = arguments.width
    config = mb.ModelConfig(
        num_layers=arguments.layers, hidden_size=wide, ffn_hidden_size=3 * wide, num_attention_heads=wide // 64, num_query_groups=max(2, wide // 256),
        kv_channels=64, qk_layernorm=True, padded_vocab_size=256, hf_model_type="qwen3", untie_embeddings_and_output_weights=False,
        rotary_base=1e6, params_dtype="bfloat16", **fields,
    )  # fmt: skip
    models = mb.get_mcore_model(config, device=arguments.device)
    config.bridge.initialize(models, seed=1)
    trainer = mb.Trainer(models, lr=arguments.lr, lr_decay_style="cosine", lr_warmup_iters=arguments.steps // 20,
                         train_iters=arguments.steps, weight_decay=0.1)  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    length, held = arguments.length, len(data) // 50

    def batch(first):
        rows = torch.stack([data[i : i + length + 1] for i in first.tolist()]).long()
        return dict(input_ids=rows[:, :-1].contiguous(), labels=rows[:, 1:].contiguous())

    losses, begin = [], time.time()
    for _ in range(arguments.steps):
        first = torch.randint(held, len(data) - length - 1, (arguments.batch,), generator=generator)
        losses.append(trainer.train_step([batch(first)]).loss)
    seconds = time.time() - begin
    found = [trainer.evaluate([batch(torch.arange(arguments.batch) * length + k * arguments.batch * length)]) for k in range(4)]
    return losses, sum(found) / len(found), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    for name, value in dict(layers=8, width=1024, batch=16, length=512).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=6e-4)
    arguments = parser.parse_args()
    data = text(8 * 1024 * 1024)
    print(
        " ".join(sys.argv),
        "| torch",
        torch.__version__,
        "|",
        torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
    )
    print("| run | " + " | ".join(f"to step {arguments.steps * (i + 1) // 10}" for i in range(10)) + " | held out | seconds |")
    print("|---" * 13 + "|")
    for name in arguments.runs:
        losses, held, seconds = train(RUNS[name], arguments, data)
        tenth = len(losses) // 10
        cells = [f"{sum(losses[i * tenth : (i + 1) * tenth]) / tenth:.4f}" for i in range(10)]
        print(f"| {name} | {' | '.join(cells)} | {held:.4f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
