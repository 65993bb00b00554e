"""What a run shows and writes while it trains: a bar or lines, logging.jsonl, tensorboard, a picture of the curves."""

import json
import math
import sys
import time
from array import array
from pathlib import Path

from ..training.reporters import open_all
from ..utils import is_master

# Dense bf16 peak of common GPUs in TFLOP/s, from their data sheets.
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "B200": 2250, "L40S": 362, "A10G": 70, "4090": 165, "A6000": 155}


def train_flops(config, tokens, squares, frozen):
    """FLOPs of forward and backward: 6 per weight of the matrices and token (4 when they are frozen), and attention with
    the causal half only: 3 x 2 x layers x heads x head width x the sum of squared document lengths."""
    width = config.num_attention_heads * config.kv_channels
    layer = config.hidden_size * (2 * width + 2 * config.num_query_groups * config.kv_channels + 3 * config.ffn_hidden_size)
    matrices = config.num_layers * layer + config.hidden_size * config.padded_vocab_size
    return (4 if frozen else 6) * matrices * tokens + 6 * config.num_layers * width * squares


def peak_tflops():
    """Peak of this machine's GPUs together, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAKS.items() if key in name), None)


class Curves:
    """What the picture shows, in a few bytes a step."""

    def __init__(self):
        self.steps, self.losses, self.norms = array("q"), array("d"), array("d")
        self.evaluated, self.eval_losses = array("q"), array("d")

    def add(self, record):
        if "loss" in record:
            self.steps.append(record["iteration"])
            self.losses.append(record["loss"])
            self.norms.append(record["grad_norm"])
        elif "eval_loss" in record:
            self.evaluated.append(record["iteration"])
            self.eval_losses.append(record["eval_loss"])

    def draw(self, path):
        try:
            import matplotlib

            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            return
        if not self.steps:
            return
        figure, (loss, norm) = plt.subplots(1, 2, figsize=(11, 4))
        loss.plot(self.steps, self.losses, marker=".", label="training")
        if self.evaluated:
            loss.plot(self.evaluated, self.eval_losses, "o-", label="evaluation")
        loss.set(xlabel="step", ylabel="loss per token", title="Loss")
        loss.legend()
        norm.plot(self.steps, self.norms, color="tab:orange")
        norm.set(xlabel="step", ylabel="gradient norm", title="Gradient norm before clipping")
        for axes in (loss, norm):
            axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)


class Progress:
    """Only rank 0 shows and writes; the others' calls do nothing."""

    def __init__(self, output_dir, total, arguments, describe, resumed=0):
        """`resumed`: the step a run goes on from; what an earlier attempt logged behind it is dropped. A run that goes on from
        nothing begins a new log, and what lay there keeps another name."""
        self.active = is_master()
        self.total, self.start, self.resumed, self.before = total, time.monotonic(), resumed, 0.0
        self.curves, self.reporters = Curves(), []
        self.bar = None
        if not self.active:
            return
        self.folder = Path(output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_log(self.folder / "logging.jsonl")
        self.log = open(self.folder / "logging.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        self.reporters = open_all(arguments, output_dir, resumed)
        print(describe, flush=True)
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self.task = self.bar.add_task("train", total=total, text="", completed=resumed)
            self.bar.start()

    def _keep_log(self, path):
        """Takes over the log's records up to the step a run goes on from; with nothing to go on from, sets the log aside."""
        if not path.exists():
            return
        if not self.resumed:
            path.rename(_unused(path.with_name("logging.previous.jsonl")))
            return
        aside = path.with_name(path.name + ".new")
        with open(path, encoding="utf-8") as old, open(aside, "w", encoding="utf-8") as new:
            for line in old:
                try:
                    record = json.loads(line)
                except ValueError:  # the last line of a run that was killed
                    continue
                if "iteration" in record and record["iteration"] <= self.resumed:
                    self.curves.add(record)
                    self.before = max(self.before, record.get("elapsed", 0.0))
                    new.write(json.dumps(record) + "\n")
        aside.replace(path)

    def step(self, record, show):
        """After every step; `show` also prints and writes."""
        if not self.active:
            return
        record["elapsed"] = self.before + time.monotonic() - self.start
        self.curves.add(record)
        text = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad {record['grad_norm']:.3f}  {record['tokens_per_second']:,.0f} tok/s"
        if record.get("tflops"):
            text += f"  {record['tflops']:.2f} TFLOP/s" + (f"  MFU {record['mfu']:.1%}" if record.get("mfu") else "")
        if self.bar:
            self.bar.update(self.task, completed=record["iteration"], text=text)
        if not show:
            return
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()
        numbers = {f"train/{key}": value for key, value in record.items() if key != "iteration"}
        for reporter in self.reporters:
            reporter.write(record["iteration"], numbers)
        if not self.bar:
            elapsed = time.monotonic() - self.start
            done = record["iteration"] - self.resumed
            left = elapsed / done * (self.total - record["iteration"]) if done > 0 else 0
            print(
                f"step {record['iteration']}/{self.total}  {text}  {record['memory_gib']:.1f} GiB  ETA {_clock(left)}", flush=True
            )

    def evaluated(self, iteration, loss):
        if not self.active:
            return
        record = {"iteration": iteration, "eval_loss": loss}
        self.curves.add(record)
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()
        for reporter in self.reporters:
            reporter.write(iteration, {"eval/loss": loss})
        self.say(f"step {iteration}: evaluation loss {loss:.4f}, perplexity {math.exp(min(loss, 50)):.2f}")

    def say(self, text):
        if self.active:
            self.bar.console.print(text) if self.bar else print(text, flush=True)

    def close(self, summary):
        if not self.active:
            return
        if self.bar:
            self.bar.stop()
        seconds = time.monotonic() - self.start
        last = {"summary": True, "seconds": round(seconds, 3), **summary}
        self.log.write(json.dumps(last) + "\n")
        self.log.close()
        for reporter in self.reporters:
            reporter.close()
        self.curves.draw(self.folder / "curves.png")
        print(f"done in {_clock(seconds)}: {json.dumps(summary)}", flush=True)


def _unused(path):
    """The path, or with the first free number: name-2.jsonl, name-3.jsonl, ..."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def _clock(seconds):
    seconds = int(seconds)
    return (
        f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        if seconds >= 3600
        else f"{seconds // 60}:{seconds % 60:02}"
    )
