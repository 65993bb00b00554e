"""Converters: functions that rename, drop or change tensors on their way in or out."""

import torch


class LazyTensor:
    """A tensor of a checkpoint that is read when asked for. A converter that only renames or drops never reads anything.

    shape, dtype: as in the file (dtype None: a format torch cannot hold). load(): the tensor, on the CPU.
    """

    def __init__(self, name, dtype, shape, load):
        self.name, self.dtype, self.shape = name, dtype, torch.Size(shape)
        self._load = load
        self.loaded = False

    def load(self):
        self.loaded = True
        return self._load()

    def __repr__(self):
        return f"LazyTensor({self.name}, {self.dtype}, {list(self.shape)})"


def result_of(converter, name, value):
    """(new name, new value) or None, checked."""
    result = converter(name, value)
    if result is None:
        return None
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], str):
        raise TypeError(f"converter: for '{name}' it returned {type(result).__name__}, not (name, tensor) or None")
    if not isinstance(result[1], (torch.Tensor, LazyTensor)):
        raise TypeError(f"converter: for '{name}' it returned a {type(result[1]).__name__} as the value, not a tensor")
    return result


def saved_tensor(converter):
    """(name, shape, dtype) -> None, or (new name, function of the value or None, shape, dtype): how the engine asks what
    becomes of a tensor before it has any. A converter that cannot work without data is an error that says so."""

    def ask(name, shape, dtype):
        probe = torch.empty(shape, dtype=dtype, device="meta")
        try:
            result = result_of(converter, name, probe)
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"save_weights: the converter fails for '{name}' without data ({error}); sizes must be known before data is "
                "written, so it may not look at values: use export_weights(converter=...) and save what it yields"
            ) from error
        if result is None:
            return None
        target, value = result
        if value is probe:
            return target, None, shape, dtype

        def make(tensor):
            return result_of(converter, name, tensor)[1]

        return target, make, list(value.shape), value.dtype

    return ask


def conversion(converter, reader):
    """What `converter` makes of a checkpoint, as the engine takes it: {name: new name or None}, {new name: (shape, dtype,
    function that makes the tensor)}.

    A converter that changes values is asked twice: first with tensors without data (torch's meta device), to learn names and
    shapes while nothing is in memory, and with the real tensor when its turn comes. If it cannot work without data, the
    first time is with the real tensor, one at a time.
    """
    names, changed = {}, {}

    def real(name, dtype, shape):
        return LazyTensor(name, dtype, shape, lambda: reader.load(name))

    def make(name, dtype, shape):
        def value():
            made = result_of(converter, name, real(name, dtype, shape))
            made = made and made[1]
            return made.load() if isinstance(made, LazyTensor) else made

        return value

    for name, dtype, shape in reader.tensors():
        lazy = LazyTensor(name, dtype, shape, lambda d=dtype, s=shape: torch.empty(s, dtype=d, device="meta"))
        try:
            result = result_of(converter, name, lazy)
        except Exception:
            if not lazy.loaded:
                raise
            lazy = real(name, dtype, shape)
            result = result_of(converter, name, lazy)
        if result is None:
            names[name] = None
            continue
        target, value = result
        if value is lazy:
            names[name] = target
            continue
        if target in changed:
            raise ValueError(f"converter: two tensors are named '{target}'")
        names[name] = None
        changed[target] = (list(value.shape), value.dtype, make(name, dtype, shape))
    return names, changed
