"""torchrun's restarts: which attempt this is, and a store that only its ranks use.

torchrun keeps one store over all attempts, so a rank can find there where a rank of the attempt before listened, and what it
failed with. Its own count of restarts differs between nodes. So the ranks agree: each writes a random name, rank 0 answers it with
the attempt's number."""

import os
import time
import uuid

HELLO, ANSWER, TAKEN = "mcore-bridge/hello/{}", "mcore-bridge/answer/{}", "mcore-bridge/taken/{}/{}"
_number = 1
_begun = 0.0


def agree(store, rank, size, timeout):
    """The number of this attempt, from 1. `timeout`: a timedelta. TimeoutError names the ranks that did not come."""
    if rank:
        name = uuid.uuid4().hex
        store.set(HELLO.format(rank), name)
        store.wait([ANSWER.format(name)], timeout)
        number = int(store.get(ANSWER.format(name)))
        store.set(TAKEN.format(number, name), "1")
        return number
    number = store.add("mcore-bridge/attempts", 1)
    names, missing, end = {}, set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([HELLO.format(other)]):
                name = store.get(HELLO.format(other)).decode()
                if names.get(other) != name:  # the first may be what an earlier attempt left
                    names[other] = name
                    store.set(ANSWER.format(name), str(number))
                elif store.check([TAKEN.format(number, name)]):
                    missing.discard(other)
        if time.monotonic() > end:
            raise TimeoutError(f"attempt {number}: ranks {', '.join(map(str, sorted(missing)))} did not come within {timeout}")
        time.sleep(0.01)
    return number


def own_store(timeout):
    """(store, rank, size) for init_process_group under torchrun."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    global _number, _begun
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store, rank, size  # rank 0 has just opened it
    if rank == 0:
        _begun = float(store.compare_set("mcore-bridge/begun", "", str(time.time())))
    _number = agree(store, rank, size, timeout)
    return PrefixStore(f"mcore-bridge/attempt-{_number}", store), rank, size


def begun():
    """When the first attempt began, in seconds since 1970, on rank 0; 0 when nobody knows."""
    return _begun


def restarted():
    """Whether torchrun has started these ranks before."""
    return _number > 1 or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) or 0) > 0
