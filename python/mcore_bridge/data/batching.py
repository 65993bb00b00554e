"""Samples into the dicts that train_step takes."""

from .template import IGNORE


def _shifted(labels):
    return [*labels[1:], IGNORE]


def flat_batch(samples, multiple=1, pad_token=0, document_multiple=1):
    """One row of all samples: cu_seqlens keeps them apart, labels are shifted within each. Each is padded behind its tokens to
    a multiple of `document_multiple` (2 * context_parallel_size; padding carries no loss, and causal attention never looks at
    it). A dummy document without loss fills the row up to a multiple of `multiple` (sequence parallelism needs that)."""
    import torch

    from ..model import PackedSeqParams

    tokens, labels, positions, ends = [], [], [], [0]
    for sample in samples:
        padding = -len(sample["input_ids"]) % document_multiple
        tokens += [*sample["input_ids"], *[pad_token] * padding]
        labels += [*_shifted(sample["labels"]), *[IGNORE] * padding]
        positions += range(len(sample["input_ids"]) + padding)
        ends.append(len(tokens))
    if missing := -len(tokens) % multiple:
        tokens += [pad_token] * missing
        labels += [IGNORE] * missing
        positions += range(missing)
        ends.append(len(tokens))
    return dict(
        input_ids=torch.tensor([tokens]),
        labels=torch.tensor([labels]),
        position_ids=torch.tensor([positions]),
        packed_seq_params=PackedSeqParams(torch.tensor(ends, dtype=torch.int32)),
    )


def pinned(micro_batch):
    """The same in page-locked memory, from which copies to a GPU do not hold up the host."""
    from dataclasses import replace

    moved = {name: value.pin_memory() for name, value in micro_batch.items() if hasattr(value, "pin_memory")}
    if packed := micro_batch.get("packed_seq_params"):
        moved["packed_seq_params"] = replace(packed, cu_seqlens=packed.cu_seqlens.pin_memory())
    return {**micro_batch, **moved}


def padded_batch(samples, multiple=1, pad_token=0):
    """One row per sample, padded on the right. Causal attention never lets a token see the padding behind it."""
    import torch

    length = max(len(sample["input_ids"]) for sample in samples)
    length += -length % multiple
    tokens = torch.full((len(samples), length), pad_token)
    labels = torch.full((len(samples), length), IGNORE)
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        tokens[row, :size] = torch.tensor(sample["input_ids"])
        labels[row, :size] = torch.tensor(_shifted(sample["labels"]))
    return dict(input_ids=tokens, labels=labels)
