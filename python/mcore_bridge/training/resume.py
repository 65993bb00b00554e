"""Which checkpoint a run goes on from: the newest that is whole."""

import json
import re
import shutil
from datetime import datetime
from pathlib import Path

from ..engine import _core

STATE = Path("training_state") / "state.json"
FORMAT = 1


def step_of(path):
    """N of checkpoint-N; None for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", Path(path).name)
    return int(match[1]) if match else None


def checkpoints(folder):
    """The checkpoint-N of a run's folder, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=step_of)


def written(path):
    """When a checkpoint's state was written, in seconds since 1970; 0 when it has none."""
    state = Path(path) / STATE
    return state.stat().st_mtime if state.exists() else 0.0


def versions(output_dir):
    """The vN-<time> folders of output_dir, oldest first."""
    numbered = [(int(match[1]), path) for path in Path(output_dir).glob("v*-*") if (match := re.match(r"v(\d+)-", path.name))]
    return [path for _, path in sorted(numbered)]


def new_version(output_dir):
    """output_dir/vN-<time> with the next free N."""
    taken = [int(re.match(r"v(\d+)-", path.name)[1]) for path in versions(output_dir)]
    return str(Path(output_dir) / f"v{max(taken, default=-1) + 1}-{datetime.now():%Y%m%d-%H%M%S}")


def clean(folder):
    """Removes what a killed save left in a run's folder; puts back a checkpoint that was set aside."""
    for left in Path(folder).glob(".checkpoint-*.old"):
        target = left.with_name(left.name[1 : -len(".old")])
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(target)
    for left in Path(folder).glob(".checkpoint-*.saving*"):
        shutil.rmtree(left, ignore_errors=True)


def run_folder(arguments, source, restarted=False):
    """Where a run writes. Going on with `auto` (and inside a run's folder) means in the same place; so does a restart by torchrun,
    whose first attempt has made the newest folder."""
    if source not in (None, "auto"):
        path = Path(source)
        inside = path.parent if step_of(path) is not None else path
        if not arguments.finetune and _holds(inside, arguments.output_dir):
            return str(inside)
    if (source == "auto" or restarted) and arguments.add_version:
        earlier = versions(arguments.output_dir)
        if earlier:
            return str(earlier[-1])
    return _fresh(arguments)


def _holds(folder, output_dir):
    folder, output_dir = folder.resolve(), Path(output_dir).resolve()
    return folder == output_dir or folder.parent == output_dir


def _fresh(arguments):
    return new_version(arguments.output_dir) if arguments.add_version else arguments.output_dir


def candidates(arguments, source):
    """Checkpoints to try, best first. FileNotFoundError when an explicit path holds none."""
    if source == "auto":
        roots = [*reversed(versions(arguments.output_dir)), Path(arguments.output_dir)]
        return [path for root in roots for path in reversed(checkpoints(root))]
    path = Path(source)
    if not path.is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint {source}: no such folder")
    if step_of(path) is None and (path / STATE).exists():
        return [path]
    if step_of(path) is not None:
        return [path, *(other for other in reversed(checkpoints(path.parent)) if step_of(other) < step_of(path))]
    roots = [path, *reversed(versions(path))]
    found = [path for root in roots for path in reversed(checkpoints(root))]
    if not found:
        raise FileNotFoundError(f"--resume_from_checkpoint {source}: neither a checkpoint nor a folder of checkpoints")
    return found


def read_state(path):
    """state.json's content. ValueError says why the checkpoint cannot be resumed from."""
    try:
        state = json.loads((Path(path) / STATE).read_text())
    except FileNotFoundError:
        raise ValueError(f"{STATE} is missing: an incomplete checkpoint, or one without training state") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{STATE} cannot be read: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{STATE} has format {state.get('format') if isinstance(state, dict) else '?'}, this version reads {FORMAT}"
        )
    return state


def choose(paths, control, group, say):
    """(folder, state) of the first of `paths` (rank 0's, shared) that is whole, the same on all ranks; (None, None) when there is
    none. Every damaged one is named. Collective."""
    for path in paths:
        state = None
        if control.rank == 0:
            try:
                state = read_state(path)
            except ValueError as error:
                state = str(error)
        state = control.share(state)
        if isinstance(state, str):
            damage = [state]
        else:
            files = [(name, entry["bytes"], entry["crc32c"]) for name, entry in sorted(state["files"].items())]
            damage = _core.damaged_files(path, files, group)
        if not damage:
            return path, state
        say(f"{path} is not used: {'; '.join(damage[:5])}" + (f"; and {len(damage) - 5} more" if len(damage) > 5 else ""))
    return None, None
