"""The parts of a run, made from its arguments: the model with its weights, the data, the trainer."""

import os
import re

from ..data.feed import MapFeed, StreamFeed
from ..data.prepare import load_units, stream_units
from ..data.sampler import Sampler
from ..data.stream import Encoders
from .options import new_adapter, optimizer_options


def freeze(models, arguments):
    """freeze_parameters and trainable_parameters, by Megatron name."""

    def matches(name, prefixes, pattern):
        return any(name.startswith(prefix) for prefix in prefixes) or bool(pattern and re.search(pattern, name))

    for model in models:
        for name, parameter in model.named_parameters():
            if matches(name, arguments.freeze_parameters, arguments.freeze_parameters_regex):
                parameter.requires_grad_(False)
            if matches(name, arguments.trainable_parameters, arguments.trainable_parameters_regex):
                parameter.requires_grad_(True)


def build_models(arguments, config, folder, checkpoint):
    """The model with its weights and adapter: the user's, or those of the checkpoint a run goes on from."""
    import mcore_bridge as mb

    from ..cli.session import load_adapter

    if arguments.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    mb.set_random_seed(arguments.seed)
    models = mb.get_mcore_model(config)
    lora = arguments.tuner_type == "lora"
    if lora and not (arguments.trainable_parameters or arguments.trainable_parameters_regex or arguments.modules_to_save):
        # As add_lora does later: with fp8_param no values are kept for masters that will never be.
        for model in models:
            model.requires_grad_(False)
    if checkpoint and not lora:
        config.bridge.load_weights(models, checkpoint)
    elif arguments.perform_initialization:
        config.bridge.initialize(models, seed=arguments.seed)
    elif arguments.mcore_model:
        from ..megatron import load_megatron

        load_megatron(models, arguments.mcore_model)
    else:
        config.bridge.load_weights(models, folder)
    if lora and (checkpoint or arguments.adapters):
        load_adapter(models, config, checkpoint or arguments.adapters[0])
    elif lora:
        mb.add_lora(models, new_adapter(arguments))
    freeze(models, arguments)
    return models


class Data:
    """Training and validation data of this rank."""

    def __init__(self, arguments, config, folder, parallel, packed_multiple=None):
        """`packed_multiple`: that of the run this one goes on with (state.json)."""
        from transformers import AutoTokenizer

        from ..cli.session import sequence_multiples

        self.arguments, self.parallel = arguments, parallel
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_length = arguments.max_length or min(config.max_position_embeddings or 8192, 8192)
        multiples = sequence_multiples(config, parallel)
        self.packed_multiple = packed_multiple or multiples[1]
        multiples = (*multiples, self.packed_multiple)
        if len(tokenizer) > config.padded_vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {config.padded_vocab_size}")
        self.units = self.held_out = self.encoders = None
        if arguments.streaming:
            if arguments.train_iters is None:
                raise ValueError("--streaming true needs --train_iters: how long a stream is nobody knows beforehand")
            if arguments.save_strategy == "epoch":
                raise ValueError("--save_strategy epoch needs data in memory; with --streaming true use steps")
            self.encoders = Encoders(arguments.dataset_num_proc)
            self.stream, self.make_units = stream_units(arguments, tokenizer, self.max_length, *multiples, self.encoders)
            if arguments.val_dataset:
                held_out = {**vars(arguments), "dataset": arguments.val_dataset, "val_dataset": [], "interleave_prob": []}
                self.held_out, _ = load_units(type(arguments)(**held_out), tokenizer, self.max_length, *multiples)
        else:
            self.units, self.held_out = load_units(arguments, tokenizer, self.max_length, *multiples)
        self.sampler = self._sampler(self.units, arguments.train_dataloader_shuffle)
        self.eval_sampler = self._sampler(self.held_out, False, once=True) if self.held_out and arguments.eval_iters else None
        self.train_iters = arguments.train_iters or self.sampler.steps(arguments.num_train_epochs)

    def _sampler(self, units, shuffle, once=False):
        a = self.arguments
        return Sampler(
            None if units is None else len(units), a.micro_batch_size, a.global_batch_size, self.parallel.dp_rank,
            self.parallel.dp_size, seed=a.data_seed, shuffle=shuffle, once=once,
        )  # fmt: skip

    def feed(self, position=None):
        """The training batches from a position of state.json on."""
        if self.units is None:
            return StreamFeed(self.stream, self.make_units, self.sampler, position)
        return MapFeed(self.units, self.sampler, position)

    @property
    def steps_per_epoch(self):
        return self.sampler.steps(1) if self.units is not None else None

    def describe(self):
        a = self.arguments
        kind = "packed rows" if a.packing else "samples"
        if self.units is None:
            return f"data: streamed from {len(a.dataset)} datasets in chunks of {a.shuffle_buffer_size:,} rows"
        return f"data: {len(self.units.samples):,} samples, {self.units.tokens:,} tokens, {len(self.units):,} {kind}"

    def close(self):
        if self.encoders:
            self.encoders.close()


def build_trainer(models, a, train_iters):
    import mcore_bridge as mb

    warmup = a.lr_warmup_iters
    if a.lr_warmup_fraction is not None:
        warmup = int(a.lr_warmup_fraction * (a.lr_decay_iters or train_iters))
    return mb.Trainer(
        models, lr=a.lr, min_lr=a.min_lr, lr_decay_style=a.lr_decay_style, lr_decay_iters=a.lr_decay_iters or 0,
        lr_warmup_iters=warmup, lr_warmup_init=a.lr_warmup_init, lr_wsd_decay_style=a.lr_wsd_decay_style,
        lr_wsd_decay_iters=a.lr_wsd_decay_iters or 0, train_iters=train_iters, weight_decay=a.weight_decay,
        clip_grad=a.clip_grad, adam_beta1=a.adam_beta1, adam_beta2=a.adam_beta2, adam_eps=a.adam_eps,
        calculate_per_token_loss=a.calculate_per_token_loss, **optimizer_options(a),
    )  # fmt: skip
