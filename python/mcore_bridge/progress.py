"""A progress bar on rank 0 for what takes long."""

from .utils import is_master


class Progress:
    """Called with (done bytes, total bytes). disable: True never shows, False always, None from 2 GB on."""

    def __init__(self, text, disable=None):
        self.text, self.disable = text, disable
        self.bar = None

    def __call__(self, done, total):
        if self.bar is None:
            if self.disable or (self.disable is None and total < 2e9) or not is_master():
                return
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=self.text, unit="B", unit_scale=True)
        self.bar.update(done - self.bar.n)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()
