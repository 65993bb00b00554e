"""From dataset arguments to training units: read, normalise, encode, truncate, pack."""

import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from ..utils import get_logger
from .batching import flat_batch, padded_batch
from .dataset import normalise, read_rows
from .packing import pack
from .template import IGNORE, Template, truncate


def _encode(row, template, arguments, max_length):
    """(sample or None, why it was dropped)."""
    try:
        sample = template.encode(normalise(row, arguments.columns, arguments.system))
    except (ValueError, TypeError, KeyError) as error:
        return None, str(error)
    sample = truncate(sample, max_length, arguments.truncation_strategy)
    return sample, None if sample else f"longer than max_length {max_length} (or nothing left to learn)"


def encode_rows(rows, template, arguments, max_length):
    """Samples of rows; what cannot be used is counted and named, or an error with --strict true."""
    work = partial(_encode, template=template, arguments=arguments, max_length=max_length)
    if arguments.dataset_num_proc > 1:
        with ProcessPoolExecutor(arguments.dataset_num_proc) as pool:
            results = list(pool.map(work, rows, chunksize=256))
    else:
        results = map(work, rows)
    samples, dropped = [], []
    for index, (sample, why) in enumerate(results):
        if sample is not None:
            samples.append(sample)
        elif arguments.strict:
            raise ValueError(f"dataset row {index}: {why}")
        else:
            dropped.append((index, why))
    if dropped:
        get_logger().warning(
            f"{len(dropped)} of {len(dropped) + len(samples)} rows are left out, e.g. row {dropped[0][0]}: {dropped[0][1]}"
        )
    if not samples:
        raise ValueError(
            f"no usable row is left; the first was left out because: {dropped[0][1] if dropped else 'there are none'}"
        )
    return samples


class Units:
    """Training units (a sample, or a packed row of samples) and how a micro-batch of them looks."""

    def __init__(self, samples, arguments, max_length, multiple, pad_token, document_multiple=1):
        self.samples, self.multiple, self.pad_token, self.document_multiple = samples, multiple, pad_token, document_multiple
        self.flat = arguments.packing or arguments.padding_free
        if arguments.packing:
            capacity = arguments.packing_length or max_length
            lengths = [len(sample["input_ids"]) for sample in samples]
            self.rows = pack([length + -length % document_multiple for length in lengths], capacity)
        else:
            self.rows = [[index] for index in range(len(samples))]

    def __len__(self):
        return len(self.rows)

    @property
    def tokens(self):
        return sum(len(sample["input_ids"]) for sample in self.samples)

    def loss_tokens(self, units):
        """How many tokens of the units carry loss: a sample's first token is nobody's target."""
        samples = [self.samples[index] for unit in units if unit is not None for index in self.rows[unit]]
        return sum(label != IGNORE for sample in samples for label in sample["labels"][1:])

    def micro_batch(self, units):
        """A micro-batch of the units; None stands for a token without loss."""
        nothing = {"input_ids": [self.pad_token], "labels": [IGNORE]}
        samples = [
            sample
            for unit in units
            for sample in ([nothing] if unit is None else [self.samples[index] for index in self.rows[unit]])
        ]
        if self.flat:
            return flat_batch(samples, self.multiple, self.pad_token, self.document_multiple)
        return padded_batch(samples, self.multiple, self.pad_token)


def load_units(arguments, tokenizer, max_length, multiple, document_multiple=1):
    """(training units, validation units or None)."""
    if not arguments.dataset:
        raise ValueError("--dataset is missing")
    template = Template(tokenizer, arguments.use_chat_template, arguments.loss_scale)
    rows = [row for source in arguments.dataset for row in read_rows(source, arguments.data_seed)]
    if arguments.dataset_shuffle:
        random.Random(arguments.data_seed).shuffle(rows)
    held_out = [row for source in arguments.val_dataset for row in read_rows(source, arguments.data_seed)]
    if not 0 <= arguments.split_dataset_ratio < 1:
        raise ValueError(f"split_dataset_ratio {arguments.split_dataset_ratio} must be in [0, 1)")
    if arguments.split_dataset_ratio and not held_out:
        count = max(1, int(len(rows) * arguments.split_dataset_ratio))
        rows, held_out = rows[:-count], rows[-count:]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def units(some):
        return Units(encode_rows(some, template, arguments, max_length), arguments, max_length, multiple, pad, document_multiple)

    return units(rows), units(held_out) if held_out else None
