"""Several datasets mixed with given probabilities: which dataset each row comes from is a function of the seed alone."""

import random

BLOCK = 1024  # draws that share a random generator, so that any draw can be found again without all before it


def check(probabilities, count):
    """Probabilities as floats that sum to 1. ValueError when they are none, or not one per dataset."""
    values = [float(item) for item in probabilities]
    if len(values) != count:
        raise ValueError(f"--interleave_prob has {len(values)} numbers, --dataset {count} names")
    if any(not 0 < value <= 1 for value in values) or abs(sum(values) - 1) > 1e-6:
        raise ValueError(f"--interleave_prob {' '.join(map(str, values))}: every number must be positive and their sum 1")
    return values


def draws(probabilities, key, start=0):
    """Dataset indices from the `start`-th draw on, for ever."""
    choices = range(len(probabilities))
    block, skip = divmod(start, BLOCK)
    while True:
        picked = random.Random(f"{key}-{block}").choices(choices, probabilities, k=BLOCK)
        yield from picked[skip:]
        block, skip = block + 1, 0


def interleave(datasets, probabilities, strategy, seed):
    """Rows of lists, mixed. first_exhausted ends with the last row of the first list that runs out; all_exhausted starts lists
    over until every one has been used up."""
    taken, done, result = [0] * len(datasets), [False] * len(datasets), []
    for which in draws(probabilities, f"{seed}-interleave"):
        rows = datasets[which]
        result.append(rows[taken[which] % len(rows)])
        taken[which] += 1
        done[which] = done[which] or taken[which] == len(rows)
        if all(done) if strategy == "all_exhausted" else done[which]:
            return result
