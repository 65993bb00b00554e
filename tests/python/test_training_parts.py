"""The parts of a run that need no model: spikes, streams, mixtures, loaders, generators, which checkpoint is chosen."""

import json
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from mcore_bridge.cli import attempt, failures
from mcore_bridge.cli.failures import missing_ranks
from mcore_bridge.cli.progress import Progress
from mcore_bridge.data.batching import flat_batch
from mcore_bridge.data.feed import Batch, StreamFeed
from mcore_bridge.data.interleave import check, draws, interleave
from mcore_bridge.data.loader import Loader
from mcore_bridge.data.sampler import Sampler
from mcore_bridge.data.stream import Stream, start_position
from mcore_bridge.training import checkpoints, reporters, resume, rng_state
from mcore_bridge.training.guards import SpikeDetector
from mcore_bridge.training.profile import parse_steps
from torch.distributed import HashStore


def test_spikes():
    noise = random.Random(1)
    detector = SpikeDetector(8.0)
    calm = [detector.is_spike(3 - step * 0.01 + noise.gauss(0, 0.05))[0] for step in range(200)]
    assert not any(calm)
    assert detector.is_spike(9.0)[0] and not detector.is_spike(1.0)[0]
    again = SpikeDetector(8.0, list(detector.recent))
    assert again.is_spike(2.0) == detector.is_spike(2.0)
    flat = SpikeDetector(8.0, [2.0] * 30)
    assert not flat.is_spike(2.05)[0] and flat.is_spike(3.0)[0]
    assert not SpikeDetector(0.0, [1.0] * 30).is_spike(100.0)[0]


def test_interleaving():
    lists = [[f"a{i}" for i in range(50)], [f"b{i}" for i in range(10)]]
    first = interleave(lists, [0.5, 0.5], "first_exhausted", 1)
    assert first == interleave(lists, [0.5, 0.5], "first_exhausted", 1) != interleave(lists, [0.5, 0.5], "first_exhausted", 2)
    assert [row for row in first if row[0] == "b"] == lists[1] and first[-1] == "b9"
    every = interleave(lists, [0.5, 0.5], "all_exhausted", 1)
    assert set(every) == {*lists[0], *lists[1]} and [row for row in every if row[0] == "a"] == lists[0]
    share = sum(which for which, _ in zip(draws([0.3, 0.7], "x"), range(20000))) / 20000
    assert abs(share - 0.7) < 0.02
    long = [which for which, _ in zip(draws([0.3, 0.7], "x"), range(3000))]
    assert [which for which, _ in zip(draws([0.3, 0.7], "x", 1500), range(1500))] == long[1500:]
    for bad in (["0.5"], ["0.5", "0.6"], ["1.5", "-0.5"]):
        with pytest.raises(ValueError, match="interleave_prob"):
            check(bad, 2)


def files(tmp_path):
    sources = []
    for name, count in (("a", 23), ("b", 7)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(count)))
        sources.append(str(path))
    return sources


@pytest.mark.parametrize("mix", [None, ("first_exhausted",), ("all_exhausted",)])
def test_stream_goes_on_from_any_chunk(tmp_path, mix):
    sources = files(tmp_path)

    def stream():
        more = dict(probabilities=[0.6, 0.4], strategy=mix[0]) if mix else {}
        return Stream(sources, 5, 4, **more)

    position, chunks, one = start_position(2), [], stream()
    for _ in range(25):
        rows, following = one.chunk(position)
        assert (rows, following) == stream().chunk(position), "a fresh stream finds the same"
        chunks.append((position["epoch"], [row["text"] for _, _, row in rows]))
        position = following
    epoch = [text for number, rows in chunks for text in rows if number == 1]
    if mix is None:
        assert sorted(epoch) == sorted([f"a{i}" for i in range(23)] + [f"b{i}" for i in range(7)])
        assert epoch != [text for number, rows in chunks for text in rows if number == 0]
    elif mix[0] == "all_exhausted":
        assert {f"a{i}" for i in range(23)} <= set(epoch)
    else:
        assert len(set(epoch)) == len(epoch)


class Fake:
    """Units as StreamFeed uses them: one row each."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def samples_of(self, unit):
        return [self.rows[unit]]

    def row_ids(self, units):
        return [self.rows[unit] for unit in units]

    def build(self, samples):
        return samples


@pytest.mark.parametrize("workers", [0, 3])
def test_stream_batches_do_not_depend_on_ranks_or_workers(tmp_path, workers):
    sources = files(tmp_path)

    def batches(ranks, count, position=None):
        loaders = []
        for rank in range(ranks):
            feed = StreamFeed(
                Stream(sources, 5, 6),
                lambda rows: Fake([row["text"] for _, _, row in rows]),
                Sampler(None, 1, 4, rank, ranks),
                position,
            )
            loaders.append(Loader(feed, workers))
        steps = [[next(loader) for loader in loaders] for _ in range(count)]
        for loader in loaders:
            loader.close()
        assert all(batch.position == step[0].position for step in steps for batch in step)
        return [[row for batch in step for row in batch.rows] for step in steps], steps[-1][0].position

    whole, _ = batches(1, 17)
    first, position = batches(2, 9)
    second, _ = batches(4, 8, json.loads(json.dumps(position)))
    assert first + second == whole
    assert sorted(row for rows in whole for row in rows[:])[:2] == ["a0", "a0"]


def test_loader_passes_errors_on_and_ends_its_threads():
    def feed():
        yield lambda: 1
        yield lambda: 1 // 0

    loader = Loader(feed(), 2)
    assert next(loader) == 1
    with pytest.raises(ZeroDivisionError):
        next(loader)
    loader.close()

    def endless():
        while True:
            yield lambda: time.sleep(0.01)

    loader = Loader(endless(), 2)
    next(loader)
    loader.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("mcb-")]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_pins(workers):
    class Numbered:
        def __init__(self, number):
            self.number = number

        def pinned(self):
            return self.number + 100

    loader = Loader(((lambda number=number: Numbered(number)) for number in range(3)), workers, pin=True)
    assert [next(loader) for _ in range(3)] == [100, 101, 102]
    loader.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory belongs to a GPU")
def test_pinned_batches():
    batch = flat_batch([dict(input_ids=[1, 2, 3], labels=[-100, 2, 3])])
    (moved,) = Batch([batch], []).pinned().micro_batches
    assert moved["packed_seq_params"].cu_seqlens.is_pinned()
    for name in ("input_ids", "labels", "position_ids"):
        assert moved[name].is_pinned() and torch.equal(moved[name], batch[name])


def test_generators_go_on():
    random.seed(3), torch.manual_seed(3)
    import numpy

    numpy.random.seed(3)
    random.gauss(0, 1), numpy.random.standard_normal()
    state = json.loads(json.dumps(rng_state.capture()))

    def some():
        return random.random(), random.gauss(0, 1), numpy.random.standard_normal(), torch.rand(3).tolist()

    expected = some()
    some()
    rng_state.restore(state)
    assert some() == expected


def test_which_checkpoint(tmp_path):
    def make(*names):
        for name in names:
            (tmp_path / name / "training_state").mkdir(parents=True)

    make("v0-20250101-000000/checkpoint-9", "v1-20250102-000000/checkpoint-2", "v1-20250102-000000/checkpoint-10")
    make("v10-20250103-000000", "v1-20250102-000000/checkpoint-10-merged")
    arguments = SimpleNamespace(output_dir=str(tmp_path), add_version=True, finetune=None, resume_from_checkpoint="auto")
    names = [path.relative_to(tmp_path).as_posix() for path in resume.candidates(arguments, "auto")]
    assert names == ["v1-20250102-000000/checkpoint-10", "v1-20250102-000000/checkpoint-2", "v0-20250101-000000/checkpoint-9"]
    assert resume.run_folder(arguments, "auto").endswith("v10-20250103-000000")
    inside = str(tmp_path / "v1-20250102-000000/checkpoint-2")
    assert resume.run_folder(arguments, inside).endswith("v1-20250102-000000")
    assert [path.name for path in resume.candidates(arguments, str(tmp_path / "v1-20250102-000000/checkpoint-10"))] == [
        "checkpoint-10",
        "checkpoint-2",
    ]
    assert "v11-" in resume.run_folder(SimpleNamespace(**{**vars(arguments), "finetune": True}), inside)
    assert "v11-" in resume.run_folder(arguments, None)
    assert resume.run_folder(arguments, None, restarted=True).endswith("v10-20250103-000000")
    assert resume.run_folder(arguments, inside, restarted=True).endswith("v1-20250102-000000")
    with pytest.raises(FileNotFoundError, match="none"):
        resume.candidates(arguments, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="state.json is missing"):
        resume.read_state(inside)
    (tmp_path / "v1-20250102-000000/.checkpoint-2.saving-7").mkdir()
    (tmp_path / "v1-20250102-000000/.checkpoint-7.old").mkdir()
    resume.clean(tmp_path / "v1-20250102-000000")
    left = sorted(path.name for path in (tmp_path / "v1-20250102-000000").iterdir())
    assert left == ["checkpoint-10", "checkpoint-10-merged", "checkpoint-2", "checkpoint-7"]


def test_every_attempt_of_torchrun_has_a_store_of_its_own():
    """The store keeps what the attempt before wrote; a rank of it may have died anywhere."""
    store, soon = HashStore(), timedelta(seconds=20)

    def ranks(*which, timeout=soon):
        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(attempt.agree, store, rank, 4, timeout) for rank in which]
        return [future.result() for future in found]

    assert ranks(0, 1, 2, 3) == [1] * 4 and ranks(3, 2, 1, 0) == [2] * 4
    with pytest.raises(TimeoutError, match="attempt 3: ranks 2 did not come"):
        ranks(0, 1, 3, timeout=timedelta(seconds=0.5))
    assert ranks(2, 3, 0, 1) == [4] * 4


@pytest.mark.parametrize("living", [2, 1])
def test_a_signal_ends_a_rank_whose_peer_is_gone(monkeypatch, living):
    ended, store = [], HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(failures, "SECONDS_OF_ROLL_CALL", 0.2)
    monkeypatch.setattr(failures, "_signal", lambda: signal.SIGTERM)
    monkeypatch.setattr(failures, "_end_by", lambda number, why: ended.append((number, why)))
    sentinels = [failures.Sentinel(store, 60) for _ in range(living)]
    for one in sentinels:
        one.interval = 0.01
        one.start()
    time.sleep(0.6)
    for one in sentinels:
        one.stop.set()
        one.join()
    assert ended[:1] == ([] if living == 2 else [(signal.SIGTERM, "1 of 2 ranks are gone")])


def test_a_run_from_the_beginning_begins_a_log(tmp_path):
    """Killed before its first checkpoint, a run starts anew in the same folder: the log holds every step once, nothing is lost."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = SimpleNamespace(report_to=["tensorboard"], tensorboard_dir=None)

    def attempt(steps, resumed=0):
        progress = Progress(tmp_path, 9, arguments, "", resumed=resumed)
        for step in steps:
            record = dict(iteration=step, loss=1.0, lr=0.1, grad_norm=1.0, tokens_per_second=1.0, memory_gib=0.1)
            progress.step(record, show=True)
        progress.log.close()
        progress.reporters[0].close()

    def logged(name):
        return [json.loads(line)["iteration"] for line in (tmp_path / name).read_text().splitlines()]

    attempt([1, 2])
    attempt([1, 2, 3])
    attempt([1, 2, 3, 4, 5])
    attempt([4, 5, 6], resumed=3)
    assert logged("logging.jsonl") == [1, 2, 3, 4, 5, 6]
    assert logged("logging.previous.jsonl") == [1, 2] and logged("logging.previous-2.jsonl") == [1, 2, 3]
    shown = EventAccumulator(str(tmp_path / "runs")).Reload().Scalars("train/loss")
    assert [event.step for event in shown] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_run_that_goes_on_is_the_same_run_to_its_trackers(tmp_path, monkeypatch, name):
    """A stand-in for the service's module: what it is given, and that a second attempt names the first one's id."""
    calls = []

    def init(**given):
        calls.append(given)
        return SimpleNamespace(id=given.get("id") or f"run{len(calls)}", log=log, finish=lambda: calls.append("finish"))

    def log(numbers, step):
        calls.append((step, numbers))

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init, log=log, finish=lambda: calls.append("finish")))
    arguments = SimpleNamespace(report_to=[name], **{f"{name}_project": None, f"{name}_exp_name": "tiny"})
    for resumed in (0, 5, 0):
        (reporter,) = reporters.open_all(arguments, tmp_path, resumed)
        reporter.write(resumed + 1, {"train/loss": 2.0})
        reporter.close()
    assert [calls[at].get("id") for at in (0, 3, 6)] == [None, "run1", None]
    assert calls[0]["project"] == "megatron-swift" and calls[3]["resume"] == "allow" and not calls[6].get("resume")
    assert calls[1] == (1, {"train/loss": 2.0}) and calls[4][0] == 6 and calls[2] == calls[5] == "finish"


def test_old_checkpoints_go_but_not_the_last(tmp_path):
    """A damaged checkpoint of a later step, left by an earlier attempt, does not count for save_total_limit."""
    arguments = SimpleNamespace(create_checkpoint_symlink=False, save_total_limit=1, tuner_type="full")
    mine = checkpoints.Checkpoints.__new__(checkpoints.Checkpoints)
    mine.arguments, mine.output_dir, mine.best = arguments, tmp_path, None
    for step in (5, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mine.last = tmp_path / "checkpoint-6"
    mine._tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-8"]


def test_profile_steps():
    assert parse_steps("3-5") == (3, 5) and parse_steps("4") == (4, 4)
    for bad in ("", "x", "5-3", "0-2"):
        with pytest.raises(ValueError, match="--profile"):
            parse_steps(bad)


def test_missing_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "0")

    def record(group, ranks, *operations):
        listed = [dict(number=n, operation=name, shape="[4]", age=age, seconds=took) for n, name, age, took in operations]
        return dict(group=group, ranks=ranks, operations=listed)

    own = [record("tp", [0, 1, 2, 3], (7, "all_reduce", 30.0, 0.1), (8, "all_gather", 29.0, None)), record("pp", [0, 4])]
    own = [entry for entry in own if entry["operations"]]
    others = {
        1: [record("tp", [0, 1, 2, 3], (8, "all_gather", 29.0, None))],
        2: [record("tp", [0, 1, 2, 3], (7, "all_reduce", 30.0, 0.1)), record("pp", [2, 6], (3, "recv", 28.0, None))],
    }
    text = "\n".join(missing_ranks(own, others))
    assert "waited 29 s in all_gather [4] (number 8) of group tp of ranks 0, 1, 2, 3" in text
    assert "rank 1" not in text
    assert "rank 2 never came: its last was all_reduce (number 7), 30 s ago; it waits in recv (number 3) of group pp" in text
    assert "rank 3 does not answer" in text
