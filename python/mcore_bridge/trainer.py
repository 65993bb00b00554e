"""Training: one engine call per global batch."""

from .engine import _core
from .model import engines


class Trainer:
    """AdamW over the trainable parameters of `models`. Options: mcore_bridge/trainer.h, OptimizerOptions, by name
    (lr, min_lr, lr_decay_style, lr_warmup_iters, train_iters, weight_decay, clip_grad, adam_beta1, ...)."""

    def __init__(self, models, **options):
        self._engine = _core.Trainer(engines(models), options)

    def train_step(self, micro_batches):
        """One optimizer step over this data-parallel rank's micro-batches: dicts of input_ids, labels (aligned with
        input_ids: labels[t] is the target of position t), and optionally position_ids, attention_mask, packed_seq_params.
        Returns iteration, loss, grad_norm, lr, tokens, loss_tokens. Raises FloatingPointError for NaN/Inf before anything
        is updated."""
        return self._engine.train_step(list(micro_batches))

    def evaluate(self, micro_batches):
        """Mean loss per token, without gradients."""
        return self._engine.evaluate(list(micro_batches))

    @property
    def iteration(self):
        return self._engine.iteration


def finish_gradients(models):
    """For loops of one's own, between backward() and optimizer.step(): completes gradients over the model-parallel ranks
    (norms under sequence parallelism, LoRA matrices, tied embeddings) and sums them over the data-parallel ones. Collective."""
    _core.finish_gradients(engines(models))
