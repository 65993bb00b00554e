"""From dataset arguments to training units: read, normalise, encode, truncate, pack."""

import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from ..utils import get_logger
from .batching import flat_batch, padded_batch
from .dataset import normalise, numbered_rows
from .feed import checksum_of
from .interleave import check, interleave
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


def encode_rows(rows, template, arguments, max_length, names=None):
    """Samples of rows; what cannot be used is counted and named, or an error with --strict true."""
    work = partial(_encode, template=template, arguments=arguments, max_length=max_length)
    if arguments.dataset_num_proc > 1:
        with ProcessPoolExecutor(arguments.dataset_num_proc) as pool:
            results = list(pool.map(work, rows, chunksize=256))
    else:
        results = map(work, rows)
    return kept_samples(results, arguments.strict, names)


def kept_samples(results, strict, names=None):
    """The samples of what _encode returned. `names`: what each row is called in messages."""
    samples, dropped = [], []
    for index, (sample, why) in enumerate(results):
        index = names[index] if names else index
        if sample is not None:
            sample["row"] = index
            samples.append(sample)
        elif strict:
            raise ValueError(f"dataset row {_shown(index)}: {why}")
        else:
            dropped.append((index, why))
    if dropped:
        get_logger().warning(
            f"{len(dropped)} of {len(dropped) + len(samples)} rows are left out, e.g. row {_shown(dropped[0][0])}: {dropped[0][1]}"
        )
    if not samples:
        raise ValueError(
            f"no usable row is left; the first was left out because: {dropped[0][1] if dropped else 'there are none'}"
        )
    return samples


def _shown(name):
    return f"{name['row']} of {name['source']}" if isinstance(name, dict) else name


class Units:
    """Training units (a sample, or a packed row of samples) and how a micro-batch of them looks."""

    def __init__(self, samples, arguments, max_length, multiple, pad_token, document_multiple=1, packed_multiple=None):
        """`packed_multiple`: what documents count as when rows are packed: that of the layout a run began on, so that the rows
        stay the same on any other; there a row may be a few tokens of padding longer than its capacity."""
        self.samples, self.multiple, self.pad_token, self.document_multiple = samples, multiple, pad_token, document_multiple
        self.flat = arguments.packing or arguments.padding_free
        if arguments.packing:
            capacity = arguments.packing_length or max_length
            lengths = [len(sample["input_ids"]) for sample in samples]
            counted = packed_multiple or document_multiple
            self.rows = pack([length + -length % counted for length in lengths], capacity)
        else:
            self.rows = [[index] for index in range(len(samples))]

    def __len__(self):
        return len(self.rows)

    def checksum(self):
        """Tells whether samples are the same, in the same order."""
        return checksum_of(len(sample["input_ids"]) for sample in self.samples)

    def samples_of(self, unit):
        return [self.samples[index] for index in self.rows[unit]]

    def row_ids(self, units):
        """Where the units' samples come from."""
        return [sample.get("row") for unit in units if unit is not None for sample in self.samples_of(unit)]

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
        samples = [sample for unit in units for sample in ([nothing] if unit is None else self.samples_of(unit))]
        return self.build(samples)

    def build(self, samples):
        """The tensors of a micro-batch of samples."""
        if self.flat:
            return flat_batch(samples, self.multiple, self.pad_token, self.document_multiple)
        return padded_batch(samples, self.multiple, self.pad_token)


def load_units(arguments, tokenizer, max_length, multiple, document_multiple=1, packed_multiple=None):
    """(training units, validation units or None)."""
    if not arguments.dataset:
        raise ValueError("--dataset is missing")
    template = Template(tokenizer, arguments.use_chat_template, arguments.loss_scale)
    rows = mixed_rows(arguments)
    if arguments.dataset_shuffle:
        random.Random(arguments.data_seed).shuffle(rows)
    held_out = [row for source in arguments.val_dataset for row in named_rows(source, arguments.data_seed)]
    if not 0 <= arguments.split_dataset_ratio < 1:
        raise ValueError(f"split_dataset_ratio {arguments.split_dataset_ratio} must be in [0, 1)")
    if arguments.split_dataset_ratio and not held_out:
        count = max(1, int(len(rows) * arguments.split_dataset_ratio))
        rows, held_out = rows[:-count], rows[-count:]
    build = unit_builder(arguments, tokenizer, template, max_length, multiple, document_multiple, packed_multiple)
    return build(rows), build(held_out) if held_out else None


def named_rows(source, seed):
    """(name, row) of a source, where the name says where the row lies."""
    return [(row_name(source, index, row), row) for index, row in numbered_rows(source, seed)]


def row_name(source, index, row):
    name = {"source": source, "row": index}
    return {**name, "id": row["id"]} if isinstance(row, dict) and isinstance(row.get("id"), (str, int)) else name


def mixed_rows(arguments):
    """The training rows of all sources: one after the other, or interleaved."""
    sources = [named_rows(source, arguments.data_seed) for source in arguments.dataset]
    if arguments.interleave_prob:
        shares = check(arguments.interleave_prob, len(sources))
        return interleave(sources, shares, arguments.stopping_strategy, arguments.data_seed)
    return [row for rows in sources for row in rows]


def unit_builder(arguments, tokenizer, template, max_length, multiple, document_multiple=1, packed_multiple=None, encoders=None):
    """f(named rows) -> Units. With `encoders` (a stream) rows that cannot be used may be all of them: then None."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    work = partial(_encode, template=template, arguments=arguments, max_length=max_length)

    def build(named):
        names, rows = [name for name, _ in named], [row for _, row in named]
        if encoders is None:
            samples = encode_rows(rows, template, arguments, max_length, names)
        else:
            results = encoders.map(work, rows)
            if not arguments.strict and not any(sample for sample, _ in results):
                return None
            samples = kept_samples(results, arguments.strict, names)
        return Units(samples, arguments, max_length, multiple, pad, document_multiple, packed_multiple)

    return build


def stream_units(arguments, tokenizer, max_length, multiple, document_multiple, packed_multiple, encoders):
    """(stream, f(chunk) -> Units or None) of the training data."""
    from .stream import Stream

    if not arguments.dataset:
        raise ValueError("--dataset is missing")
    if arguments.split_dataset_ratio:
        raise ValueError("--split_dataset_ratio needs data in memory; with --streaming true use --val_dataset")
    template = Template(tokenizer, arguments.use_chat_template, arguments.loss_scale)
    shares = check(arguments.interleave_prob, len(arguments.dataset)) if arguments.interleave_prob else None
    stream = Stream(
        arguments.dataset,
        arguments.data_seed,
        arguments.shuffle_buffer_size,
        arguments.dataset_shuffle or arguments.train_dataloader_shuffle,
        shares,
        arguments.stopping_strategy,
    )
    build = unit_builder(arguments, tokenizer, template, max_length, multiple, document_multiple, packed_multiple, encoders)
    return stream, lambda rows: build([(row_name(source, index, row), row) for source, index, row in rows])
