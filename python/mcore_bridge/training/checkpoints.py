"""Saving: what a checkpoint holds, when it is written, which ones stay."""

import dataclasses
import json
import os
import shutil
import threading
import time
from pathlib import Path

from ..bridge import parse_size
from ..engine import _core
from ..trainer import materialised
from ..utils import get_logger
from . import fp8_state, rng_state
from .control import new_engine_group
from .resume import FORMAT, checkpoints, step_of


def layout_of(state, config):
    """The parallel layout of this run, as state.json records it."""
    return {
        "world_size": state.world_size,
        "tensor": state.tp_size,
        "pipeline": state.pp_size,
        "virtual_pipeline": state.vp_size,
        "context": state.cp_size,
        "data": state.dp_size,
        "expert": config.expert_model_parallel_size,
        "sequence_parallel": bool(config.sequence_parallel),
    }


def _versions():
    import torch
    import transformers

    from .. import __version__

    return {"mcore_bridge": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


class Checkpoints:
    """The checkpoints of a run. save() is collective; with async_save it returns once everything is copied to host memory."""

    def __init__(self, arguments, folder, output_dir, config, models, trainer, parallel, control, say):
        self.arguments, self.folder, self.output_dir = arguments, folder, Path(output_dir)
        self.config, self.models, self.trainer, self.parallel, self.control = config, models, trainer, parallel, control
        self.say = say
        self.lora = arguments.tuner_type == "lora"
        self.group = new_engine_group()
        self.writer = None
        self.best = None  # {"step", "value"}
        self.last = None  # path of the last checkpoint that stands
        self.failed = None  # what the background write met
        self._thread = self._done = None

    def save(self, step, state, metric, wait=False):
        """Writes checkpoint-<step>. `state`: this run's part of state.json. A full disk and the like is reported and the
        training goes on with the old checkpoints. `wait`: not in the background. True when it stands or is on its way."""
        self.finish()
        begin = time.monotonic()
        a = self.arguments
        better = self.best is None or (metric > self.best["value"] if a.greater_is_better else metric < self.best["value"])
        best = {"step": step, "value": metric} if better and metric == metric else self.best
        files, text = self._content(step, {**state, "best": best})
        target = self.output_dir / f"checkpoint-{step}"
        background = a.async_save and not wait
        with materialised(self.models):  # what full sharding has spread out must be in place while it is read
            if self.writer is None:
                self.writer = _core.CheckpointWriter(
                    self.trainer._engine, peft_format=self.lora, adapter_name="default",
                    max_shard_bytes=parse_size(a.max_shard_size), optimizer=not a.no_save_optim,
                )  # fmt: skip
            if background:
                self.writer.snapshot()
            else:
                self._write(target, files, text, best, None)
        if not background:
            return self.finish()
        blocked = time.monotonic() - begin
        self._thread = threading.Thread(
            target=self._write, args=(target, files, text, best, blocked), name="mcb-checkpoint", daemon=True
        )
        self._thread.start()
        return True

    def _content(self, step, state):
        """Files beside the tensors and state.json, on rank 0."""
        a = self.arguments
        generators = None if a.no_save_rng else self.control.gather(rng_state.capture())
        delayed = self.config.fp8 and self.config.fp8_recipe == "delayed"
        histories = self.control.gather(fp8_state.capture(self.models)) if delayed else None
        if self.control.rank:
            return [], "{}"
        from ..cli.session import side_files, tokenizer_files

        files = {"args.json": (json.dumps(dataclasses.asdict(a), indent=2) + "\n").encode()}
        if self.lora:
            config = self.config.bridge.peft_adapter_config(self.models, "default", str(a.model))
            files |= {"adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(), **tokenizer_files(self.folder)}
        else:
            files = {**side_files(self.folder, self.config, a.rope_scaling), **files}
        if generators is not None:
            content = {str(rank): generator for rank, generator in enumerate(generators)}
            files["training_state/rng.json"] = (json.dumps(content) + "\n").encode()
        if histories is not None:
            files[fp8_state.FILE] = fp8_state.text(histories).encode()
        content = {
            "format": FORMAT,
            "step": step,
            "layout": layout_of(self.parallel, self.config),
            "versions": _versions(),
            "tuner_type": a.tuner_type,
            "params_dtype": str(self.config.params_dtype).removeprefix("torch."),
            "optimizer": None if a.no_save_optim else json.loads(_core.optimizer_scalars(self.trainer._engine)),
            **state,
        }
        return list(files.items()), json.dumps(content)

    def _write(self, target, files, text, best, blocked):
        """Runs in the background thread with async_save."""
        try:
            size, seconds = self.writer.write(str(target), files, text, self.group)
            self._done = (target, best, size, seconds, blocked)
        except Exception as error:  # noqa: BLE001 - reported by finish() on the main thread
            self.failed = (target, error)

    def finish(self):
        """Waits for the write under way and draws its consequences. False when it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.settle()

    def poll(self):
        """The consequences of a write that has ended, without waiting."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def settle(self):
        if self.failed is not None:
            (target, error), self.failed = self.failed, None
            if not isinstance(error, OSError):
                raise error
            get_logger().error(
                f"{target} was not saved, training goes on: {error}; the last whole one is {self.last or 'none yet'}"
            )
            return False
        if self._done is not None:
            (target, self.best, size, seconds, blocked), self._done = self._done, None
            self.last = target
            waited = "" if blocked is None else f" ({blocked:.2f} s of it training waited)"
            self.say(f"saved {target}: {size / 1e6:,.1f} MB in {seconds + (blocked or 0):.2f} s{waited}")
            if self.control.rank == 0:
                self._tidy()
        return True

    def _tidy(self):
        a = self.arguments
        if a.create_checkpoint_symlink:
            self._link("last", self.last.name)
            if self.best:
                self._link("best", f"checkpoint-{self.best['step']}")
        if not a.save_total_limit:
            return
        best = self.best["step"] if self.best and a.save_total_limit >= 2 else None
        # One of a later step is of an earlier attempt, damaged perhaps: it must not push out what was just written.
        others = [path for path in checkpoints(self.output_dir) if step_of(path) != best and step_of(path) <= step_of(self.last)]
        kept = a.save_total_limit - (1 if best is not None and (self.output_dir / f"checkpoint-{best}").exists() else 0)
        for path in others[: -kept or None]:
            # Renamed first: a kill in the middle leaves no half checkpoint that looks whole.
            aside = path.with_name(f".{path.name}.saving")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(path.with_name(f"{path.name}-merged"), ignore_errors=True)

    def _link(self, name, target):
        new = self.output_dir / f".{name}.new"
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        os.replace(new, self.output_dir / name)

    def merged(self, step):
        """checkpoint-N-merged: the model with the adapter added in."""
        from ..cli.session import side_files

        target = self.output_dir / f"checkpoint-{step}-merged"
        files = side_files(self.folder, self.config, self.arguments.rope_scaling) if self.control.rank == 0 else {}
        self.config.bridge.save_weights(
            self.models, target, merge_lora=True, max_shard_size=self.arguments.max_shard_size, extra_files=files
        )
