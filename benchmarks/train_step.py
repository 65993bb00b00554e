"""One training step, ours beside Transformers (+ PEFT) in the same run: tokens/s, TFLOP/s, peak memory, difference in loss.

    python benchmarks/train_step.py --shape qwen3-0.6b --tuner lora --batch 2 --length 4096 --dtype bfloat16
    python benchmarks/train_step.py --shape tiny --dtype float32 --device cpu

Random weights at the real sizes. FLOPs: 6 per parameter of the matrices and token (4 when the matrix is frozen), plus causal
attention at 6 * layers * heads * head_dim * length / 2 * 2 per token and its half again for the recomputed forward of none.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

import torch

SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
                 vocab_size=2048, tie_word_embeddings=True),
    "qwen3-0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                       head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "qwen3-4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
                     head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "qwen3-8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
                     head_dim=128, vocab_size=151936, tie_word_embeddings=False),
}  # fmt: skip


def hf_config(shape):
    from transformers import Qwen3Config

    return Qwen3Config(**SHAPES[shape], max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6, dtype=None)


def flops_per_token(shape, length, tuner):
    """Forward + backward FLOPs of one token; causal attention counted at half."""
    s = SHAPES[shape]
    heads, groups, d, h = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"], s["hidden_size"]
    matrices = (
        s["num_hidden_layers"] * (h * (heads + 2 * groups) * d + heads * d * h + 3 * h * s["intermediate_size"])
        + h * s["vocab_size"]
    )
    attention = s["num_hidden_layers"] * 2 * heads * d * length  # QK^T and PV, half of the square, 2 FLOPs each
    return (6 if tuner == "full" else 4) * matrices + 3 * attention


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(step, steps, device):
    """(median seconds, first step's seconds, peak GiB, losses)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(steps + 2):
        start = time.perf_counter()
        losses.append(step())
        synchronize(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else float("nan")
    return statistics.median(times[2:]), times[0], peak, losses


def batch(arguments):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, SHAPES[arguments.shape]["vocab_size"], (arguments.batch, arguments.length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def ours(arguments, folder):
    import mcore_bridge as mb

    config = mb.ModelConfig(**mb.hf_to_mcore_config(folder), params_dtype=arguments.dtype)
    models = mb.get_mcore_model(config, device=arguments.device)
    start = time.perf_counter()
    config.bridge.load_weights(models, folder)
    synchronize(arguments.device)
    print(f"ours: loaded in {time.perf_counter() - start:.2f} s", flush=True)
    if arguments.tuner == "lora":
        mb.add_lora(models, mb.LoraOptions(r=16, lora_alpha=32))
    trainer = mb.Trainer(models, lr=1e-4, lr_decay_style="constant", train_iters=1000)
    ids, labels = batch(arguments)
    if arguments.packed:
        ends = torch.linspace(0, ids.numel(), arguments.packed + 1).int()
        micro = dict(input_ids=ids.view(1, -1), labels=labels.view(1, -1), packed_seq_params=mb.PackedSeqParams(ends))
    else:
        micro = dict(input_ids=ids, labels=labels)
    return timed(lambda: trainer.train_step([micro]).loss, arguments.steps, arguments.device)


def transformers(arguments, folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa")
    model = model.to(arguments.device).train()
    if arguments.tuner == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids, labels = (x.to(arguments.device) for x in batch(arguments))

    def step():
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return timed(step, arguments.steps, arguments.device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tuner", choices=["full", "lora"], default="full")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--packed", type=int, default=0, help="ours: the same tokens as one row of this many documents")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=["transformers"], choices=["transformers"])
    arguments = parser.parse_args()
    runs = {"ours": ours, "transformers": transformers}
    with tempfile.TemporaryDirectory() as folder:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device(arguments.device):
            model = AutoModelForCausalLM.from_config(hf_config(arguments.shape), dtype=getattr(torch, arguments.dtype))
        model.save_pretrained(folder)
        del model
        tokens = arguments.batch * arguments.length
        work = flops_per_token(arguments.shape, arguments.length, arguments.tuner) * tokens
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        machine = (
            torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
        )
        print(f"{' '.join(sys.argv)} | commit {commit or 'unknown'} | torch {torch.__version__} | {machine}")
        print(
            "| engine | ms/step | tok/s | TFLOP/s | peak GiB | first step s | first loss | last loss |\n|---|---|---|---|---|---|---|---|"
        )
        for name in ["ours", *arguments.peers]:
            seconds, first, peak, losses = runs[name](arguments, folder)
            print(f"| {name} | {seconds * 1e3:.1f} | {tokens / seconds:,.0f} | {work / seconds / 1e12:.2f} | {peak:.1f} | {first:.2f} | "
                  f"{losses[0]:.4f} | {losses[-1]:.4f} |", flush=True)  # fmt: skip
            if arguments.device.startswith("cuda"):
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
