"""A Chrome trace (chrome://tracing, https://ui.perfetto.dev) of chosen steps."""

from pathlib import Path


def parse_steps(text):
    """(first, last) of "FIRST-LAST" or "STEP"."""
    first, _, last = str(text).partition("-")
    try:
        steps = int(first), int(last or first)
    except ValueError:
        raise ValueError(f"--profile {text}: give the steps as FIRST-LAST, e.g. 10-12") from None
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"--profile {text}: steps count from 1, the first must not be behind the last")
    return steps


class Profiler:
    """before(step) and after(step) around every step; writes <folder>/steps-FIRST-LAST-rank-N.json after the last one."""

    def __init__(self, steps, folder, rank):
        self.first, self.last = parse_steps(steps) if steps else (0, -1)
        self.folder, self.rank, self._profiler = Path(folder), rank, None

    def before(self, step):
        if step == self.first:
            import torch
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def after(self, step):
        """The path of the trace when this was the last step, else None."""
        if self._profiler is None or step < self.last:
            return None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"steps-{self.first}-{self.last}-rank-{self.rank}.json"
        profiler.export_chrome_trace(str(path))
        return path
