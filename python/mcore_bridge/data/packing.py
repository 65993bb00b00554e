"""Packing whole samples into rows without padding."""

import bisect


def pack(lengths, capacity):
    """Rows (lists of sample indices) of at most `capacity` tokens each: best fit in the given order, samples never split.

    Deterministic. O(n log n): open rows are kept sorted by free space.
    """
    rows = []
    free = []  # (space, row), sorted
    for index, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"packing: sample {index} has {length} tokens, a row holds {capacity}; truncate it first")
        at = bisect.bisect_left(free, (length, -1))
        if at < len(free):
            space, row = free.pop(at)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if space > length:
            bisect.insort(free, (space - length, row))
    return rows
