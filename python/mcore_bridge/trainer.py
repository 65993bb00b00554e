"""Training: one engine call per global batch."""

import math
from contextlib import contextmanager

from .engine import _core
from .model import engines


class Trainer:
    """Trains the trainable parameters of `models`, whose values move into flat buffers (the tensor objects stay). Options by
    name, as Megatron calls them; all of them: mcore_bridge/optimizer_options.h, docs/training.md.

    lr, min_lr, lr_decay_style, lr_warmup_iters, train_iters, lr_mult={pattern: factor}, weight_decay, clip_grad, ...
    optimizer: adam, sgd or muon; use_distributed_optimizer, data_parallel_sharding_strategy, overlap_grad_reduce,
    main_params_dtype, exp_avg_dtype, optimizer_cpu_offload, ..."""

    def __init__(self, models, **options):
        self.options = options
        self._engine = _core.Trainer(engines(models), options)

    def train_step(self, micro_batches, loss_limit=math.inf):
        """One optimizer step over this data-parallel rank's micro-batches: dicts of input_ids, labels (aligned with
        input_ids: labels[t] is the target of position t), and optionally position_ids, attention_mask, packed_seq_params.
        A loss above `loss_limit` updates nothing. Returns iteration, loss, grad_norm, lr, weight_decay, tokens, loss_tokens,
        skipped (a spike: the loss was above the limit; or float16 gradients overflowed), spike, skipped_steps so far and
        loss_scale (float16). Raises FloatingPointError for NaN/Inf before anything is updated."""
        return self._engine.train_step(list(micro_batches), loss_limit)

    def diagnose(self, micro_batches):
        """After a FloatingPointError: what on this rank holds NaN or Inf (parameters, gradients, the first layer whose output
        does when the micro-batches run again), a line each. Collective."""
        return self._engine.diagnose(list(micro_batches))

    def evaluate(self, micro_batches):
        """Mean loss per token, without gradients."""
        return self._engine.evaluate(list(micro_batches))

    @property
    def iteration(self):
        return self._engine.iteration

    @iteration.setter
    def iteration(self, steps):
        """Steps done so far, for a run that goes on: the next one is steps + 1 of the learning-rate schedule."""
        self._engine.iteration = steps

    @property
    def memory(self):
        """Bytes this rank keeps between steps: parameters (those it trains; all when fully sharded), gradients, optimizer
        (masters and states), optimizer_host (the same in host memory)."""
        return self._engine.memory

    @property
    def cuda_graphs(self):
        """With cuda_graph_impl="local": graphs `recorded` and micro-batches `replayed` so far."""
        return self._engine.cuda_graphs


@contextmanager
def materialised(models):
    """Whole parameters on every rank for a while, also when they are fully sharded; what is written to them is kept.
    Collective."""
    scope = _core.MaterialisedParameters(engines(models))
    try:
        yield models
    finally:
        del scope


def finish_gradients(models):
    """For loops of one's own, between backward() and optimizer.step(): completes gradients over the model-parallel ranks
    (norms under sequence parallelism, LoRA matrices, tied embeddings) and sums them over the data-parallel ones. Collective."""
    _core.finish_gradients(engines(models))


def update_fp8_scales(models):
    """For loops of one's own with fp8_recipe "delayed", after optimizer.step(): the step's largest magnitudes join the history that
    the next step's scales come from. Without it every tensor is scaled for its own largest magnitude, as with "tensorwise".
    Collective."""
    _core.update_fp8_scales(engines(models))
