"""One training run, from arguments to the last checkpoint."""

import json
import math
import time
from pathlib import Path

from ..data.loader import Loader
from ..engine import _core
from . import fp8_state, rng_state
from .checkpoints import Checkpoints, layout_of
from .control import Control, new_engine_group
from .guards import BadBatches, SpikeDetector
from .preemption import Preemption
from .profile import Profiler
from .resume import candidates, checkpoints, choose, clean, run_folder, written
from .setup import Data, build_models, build_trainer


class Run:
    def __init__(self, arguments, folder):
        import mcore_bridge as mb

        from ..cli.estimate import check_memory
        from ..cli.session import build_config

        self.arguments, self.folder = arguments, folder
        self.config = build_config(arguments, folder)
        self.parallel = mb.get_parallel_state()
        check_memory(arguments, self.config, self.parallel.world_size)
        self.control = Control()
        self.lora = arguments.tuner_type == "lora"
        self._find_checkpoint()
        self.models = build_models(arguments, self.config, folder, self.checkpoint)
        packed_multiple = self.saved["packed_multiple"] if self.saved and not self.finetune else None
        self.data = Data(arguments, self.config, folder, self.parallel, packed_multiple)
        self.train_iters = self.data.train_iters
        self.trainer = build_trainer(self.models, arguments, self.train_iters)
        self._take_over()

    # Resuming

    def _find_checkpoint(self):
        """Where this run writes, and what it goes on from: what --resume_from_checkpoint says, or, when torchrun has started these
        ranks again, first of all what the attempt before has written."""
        a = self.arguments
        source = a.resume_from_checkpoint
        decided = self.control.share(self._decide(source) if self.control.rank == 0 else None)
        if isinstance(decided, Exception):
            raise decided
        folder, own, others = decided
        self.output_dir = Path(folder)
        self.checkpoint = self.saved = None
        self.finetune, self.load_optim, self.load_rng = a.finetune, not a.no_load_optim, not a.no_load_rng
        if not own and not others:
            return
        group = new_engine_group()
        self.checkpoint, self.saved = choose(own, self.control, group, self._announce)
        if self.saved:  # this very run: what the flags leave out of somebody else's checkpoint does not count
            self.finetune, self.load_optim, self.load_rng = False, not a.no_save_optim, not a.no_save_rng
        else:
            self.checkpoint, self.saved = choose(others, self.control, group, self._announce)
        if not self.saved and source not in (None, "auto"):
            raise ValueError(f"--resume_from_checkpoint {source}: no checkpoint there is whole")
        if self.saved and self.saved["tuner_type"] != a.tuner_type:
            raise ValueError(f"{self.checkpoint} was trained with --tuner_type {self.saved['tuner_type']}, not {a.tuner_type}")

    def _decide(self, source):
        """(folder, checkpoints of an earlier attempt of this run, checkpoints that were asked for), or the error. On rank 0."""
        from ..cli.attempt import begun, restarted

        a = self.arguments
        try:
            again = restarted()
            folder = run_folder(a, source, again)
            Path(folder).mkdir(parents=True, exist_ok=True)
            clean(folder)
            # What another run left in the folder is older.
            own = [path for path in reversed(checkpoints(folder)) if again and written(path) >= begun()]
            others = [] if source is None else [str(path) for path in candidates(a, source)]
            return folder, [str(path) for path in own], others
        except (OSError, ValueError) as error:
            return error

    def _announce(self, text):
        if self.control.rank == 0:
            print(text, flush=True)

    def _take_over(self):
        """The optimizer, the step, the data position and the random numbers of the checkpoint."""
        a, saved = self.arguments, self.saved or {}
        self.tokens = self.step = 0
        self.position = None
        recent, self.best, self.first_loss = (), None, None
        if saved:
            if self.load_optim:
                if saved["params_dtype"] != "float32" and str(self.config.params_dtype).endswith("float32"):
                    raise ValueError(
                        f"{self.checkpoint} was trained in {saved['params_dtype']}; go on with --torch_dtype {saved['params_dtype']}, "
                        "or leave its optimizer behind with --no_load_optim true"
                    )
                if saved["optimizer"] is None:
                    raise ValueError(
                        f"{self.checkpoint} was saved without its optimizer; --no_load_optim true starts a fresh one"
                    )
                _core.load_optimizer_state(self.trainer._engine, self.checkpoint, peft_format=self.lora, adapter_name="default")
                _core.set_optimizer_scalars(self.trainer._engine, json.dumps(saved["optimizer"]))
                history = Path(self.checkpoint) / fp8_state.FILE
                if history.exists():  # of delayed scaling; a run without it takes no notice
                    fp8_state.restore(self.models, history.read_text())
            if not self.finetune:
                self.step, self.tokens, self.position = saved["step"], saved["consumed_tokens"], saved["data"]
                self.trainer.iteration = self.step
                recent, self.best, self.first_loss = saved["recent_losses"], saved["best"], saved["first_loss"]
            self._take_over_generators(a, saved)
            fresh = "" if self.load_optim else " with a fresh optimizer"
            self._announce(f"resumed from {self.checkpoint} at step {self.step}{fresh}")
        self.spikes = SpikeDetector(a.loss_spike_threshold, recent)

    def _take_over_generators(self, a, saved):
        import mcore_bridge as mb

        path = Path(self.checkpoint) / "training_state" / "rng.json"
        if not self.load_rng or not path.exists():
            return
        if saved["layout"] == layout_of(self.parallel, self.config):
            rng_state.restore(json.loads(path.read_text())[str(self.control.rank)])
        else:
            # Each rank's generator belongs to a place that this layout does not have.
            mb.set_random_seed(a.seed + self.step)
            self._announce("another parallel layout than the checkpoint's: random number generators are seeded anew")

    # Training

    def describe(self):
        s, a = self.parallel, self.arguments
        total = sum(p.numel() for model in self.models for p in model.parameters())
        trained = sum(p.numel() for model in self.models for p in model.parameters() if p.requires_grad)
        layout = f"TP {s.tp_size} x PP {s.pp_size} x CP {s.cp_size} x DP {s.dp_size}" + (
            " with sequence parallelism" if self.config.sequence_parallel else ""
        )
        return (
            f"{self.config.hf_model_type}: {total:,} parameters on this rank, {trained:,} trained; {layout}; {self.config.params_dtype}\n"
            f"{self.data.describe()}; {self.train_iters} steps of {a.global_batch_size}\n"
            f"TFLOP/s per process count 6 FLOPs per matrix weight and token ({'4: the base is frozen' if self.lora else 'forward and backward'}) and causal attention halved"
        )

    def train(self):
        """Trains to the end (or to a signal) and returns the exit code."""
        from ..cli.progress import Progress

        a = self.arguments
        self.progress = progress = Progress(self.output_dir, self.train_iters, a, self.describe(), resumed=self.step)
        self.checkpoints = Checkpoints(
            a, self.folder, self.output_dir, self.config, self.models, self.trainer, self.parallel, self.control, progress.say
        )
        self.checkpoints.best = self.best
        if self.step:
            self.checkpoints.last = Path(self.checkpoint)
        self.bad_batches = BadBatches(self.output_dir, self.parallel, self.control)
        self.preemption = Preemption().install()
        pin = a.dataloader_pin_memory and next(self.models[0].parameters()).is_cuda
        loader = Loader(self.data.feed(self.position), a.dataloader_num_workers, a.dataloader_prefetch_factor, pin)
        try:
            stopped = self._loop(loader)
        finally:
            loader.close()
            self.preemption.restore()
            self.data.close()
        self.checkpoints.finish()
        progress.close(
            dict(
                output_dir=str(self.output_dir),
                checkpoint=str(self.checkpoints.last),
                train_iters=self.train_iters,
                step=self.step,
                first_loss=self.first_loss,
                last_loss=self.last_loss,
                tokens=self.tokens,
                **({"stopped_by": stopped} if stopped else {}),
            )
        )

    def _loop(self, loader):
        """Steps until the end; the name of the signal that ended it early, or None."""
        a, profiler = self.arguments, Profiler(self.arguments.profile, self.output_dir / "profile", self.control.rank)
        self.last_loss, self._ended = self.spikes.recent[-1] if self.spikes.recent else None, time.monotonic()
        self.evaluated = None
        while self.step < self.train_iters:
            batch = next(loader)
            begin = time.monotonic()
            between = begin - self._ended
            profiler.before(self.step + 1)
            self.control.begin(
                signal=self.preemption.received is not None, between=between, least=-between, data_wait=loader.wait
            )
            result = self._step(batch)
            agreed = self.control.finish()
            self._ended = time.monotonic()
            self.step += 1
            self.position = batch.position
            trace = profiler.after(self.step)
            if trace:
                self.progress.say(f"profile of steps {a.profile}: {trace}")
            last = self.step == self.train_iters
            if result is not None:
                self._report(batch, result, self._ended - begin, agreed, last)
                self._watch(batch, result)
            self.checkpoints.poll()
            self.evaluated = None
            if self.data.eval_sampler and (last or self.step % (a.eval_steps or a.save_steps) == 0):
                self.evaluated = self.evaluate()
                self.progress.evaluated(self.step, self.evaluated)
            interrupted = bool(agreed["signal"])
            if last or interrupted or self._due():
                self._save(final=last or interrupted)
            if interrupted and not last:
                name = self.control.share(self.preemption.received or "a signal to another rank")
                self.progress.say(f"{name}: stopped after step {self.step}; --resume_from_checkpoint auto goes on")
                return name
        return None

    def _due(self):
        a = self.arguments
        return self.step % (self.data.steps_per_epoch if a.save_strategy == "epoch" else a.save_steps) == 0

    def _step(self, batch):
        """The engine's step; None when it was skipped. What is not finite is named and the batch recorded."""
        try:
            limit = self.spikes.limit() if self.arguments.on_loss_spike == "skip" else math.inf
            return self.trainer.train_step(batch.micro_batches, limit)
        except FloatingPointError as error:
            self.control.finish()
            step = self.step + 1
            causes = self._causes(batch)
            rows = self.bad_batches.record(step, "nonfinite", batch.rows, message=str(error), causes=causes)
            where = "\n  ".join([f"{error}; the {rows} rows of the batch are in {self.bad_batches.path}", *causes])
            if self.arguments.on_nonfinite == "stop":
                if self.step and self.step != _step_number(self.checkpoints.last):
                    self._save(final=True)
                raise FloatingPointError(where) from None
            self.progress.say(f"skipped: {where}")
            self.trainer.iteration = step
            return None

    def _causes(self, batch):
        """What is not finite on which rank; the same text on all ranks."""
        everywhere = self.control.gather(self.trainer.diagnose(batch.micro_batches))
        lines = [f"rank {rank}: {line}" for rank, some in enumerate(everywhere or []) for line in some]
        return self.control.share(lines)

    def _watch(self, batch, result):
        spike, score = self.spikes.is_spike(result.loss)
        if not spike:
            return
        self.bad_batches.record(self.step, "spike", batch.rows, loss=result.loss, score=score, skipped=result.spike)
        text = f"step {self.step}: the loss {result.loss:.4f} is a spike ({score:.1f} robust standard deviations); see {self.bad_batches.path}"
        if result.spike:
            text += "; the step was skipped"
        if self.arguments.on_loss_spike == "stop":
            raise FloatingPointError(f"{text}; stopped before a checkpoint is written (--on_loss_spike stop)")
        self.progress.say(text)

    def _report(self, batch, result, seconds, agreed, last):
        from ..cli.progress import peak_tflops, train_flops
        from ..cli.session import peak_memory_gib

        a = self.arguments
        self.first_loss = result.loss if self.first_loss is None else self.first_loss
        self.last_loss = result.loss
        self.tokens += result.tokens
        lengths = [length for micro_batch in batch.micro_batches for length in _document_lengths(micro_batch)]
        squares = sum(length**2 for length in lengths) * self.parallel.dp_size
        tflops = train_flops(self.config, result.tokens, squares, self.lora) / seconds / 1e12 / self.parallel.world_size
        record = dict(
            iteration=result.iteration, loss=result.loss, grad_norm=result.grad_norm, lr=result.lr,
            tokens_per_second=result.tokens / seconds, memory_gib=peak_memory_gib(), tflops=tflops, consumed_tokens=self.tokens,
            step_seconds=seconds, **{f"seconds_{name}": value for name, value in _core.take_phase_seconds().items()}, data_wait=agreed["data_wait"], skew=agreed["between"] + agreed["least"],
        )  # fmt: skip
        if peak := peak_tflops():
            record["mfu"] = tflops / peak
        if result.loss_scale != 1 or result.skipped_steps:
            record.update(loss_scale=result.loss_scale, skipped_steps=result.skipped_steps)
        if result.skipped and not result.spike:
            self.progress.say(f"step {result.iteration} skipped: gradients overflowed at loss scale {result.loss_scale:g}")
        self.progress.step(record, show=last or result.iteration == 1 or result.iteration % a.logging_steps == 0)

    def _save(self, final):
        metric = self.evaluated if self.evaluated is not None else self.last_loss
        state = dict(
            consumed_samples=self.position["samples"],
            consumed_tokens=self.tokens,
            lr=_core.learning_rate(self.trainer.options, max(1, self.step)),
            data=self.position,
            packed_multiple=self.data.packed_multiple,
            seed=self.arguments.seed,
            recent_losses=list(self.spikes.recent),
            first_loss=self.first_loss,
        )
        saved = self.checkpoints.save(self.step, state, metric if metric is not None else math.nan, wait=final)
        if final and not saved:
            raise OSError(f"the last checkpoint could not be written; the last whole one is {self.checkpoints.last}")
        if self.lora and self.arguments.merge_lora:
            self.checkpoints.merged(self.step)

    def evaluate(self):
        """Mean loss over the validation data, each sample once: per token, or per micro-batch without calculate_per_token_loss."""
        a, held_out, sampler = self.arguments, self.data.held_out, self.data.eval_sampler
        batches = math.ceil(len(held_out) / a.global_batch_size)
        if a.eval_iters > 0:
            batches = min(batches, a.eval_iters)
        total = count = 0
        for step in range(batches):
            mean = self.trainer.evaluate([held_out.micro_batch(units) for units in sampler.micro_batches(step)])
            units = sampler.global_batch(step)
            if a.calculate_per_token_loss:
                part = whole = held_out.loss_tokens(units)
            else:
                # The engine counts micro-batches without any loss as well, with loss 0.
                rows = [units[at : at + a.micro_batch_size] for at in range(0, len(units), a.micro_batch_size)]
                part, whole = sum(any(unit is not None for unit in row) for row in rows), len(rows)
            total += mean * whole
            count += part
        return total / count


def _step_number(path):
    from .resume import step_of

    return step_of(path) if path else None


def _document_lengths(batch):
    packed = batch.get("packed_seq_params")
    if packed is None:
        return [batch["input_ids"].shape[1]] * batch["input_ids"].shape[0]
    return packed.cu_seqlens.diff().tolist()
