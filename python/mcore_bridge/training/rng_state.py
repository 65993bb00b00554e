"""The states of the random number generators as JSON: no pickle, readable by anyone."""

import base64
import random
from array import array

import torch

from ..engine import _core


def _text(data):
    return base64.b64encode(data).decode()


def capture():
    """This process's generators: Python, NumPy (when it is there), torch's on the CPU and on the current GPU, each followed by the
    engine's streams there (for what ranks must not draw alike)."""
    version, words, gauss = random.getstate()
    state = {
        "python": {"version": version, "words": _text(array("I", words).tobytes()), "gauss": gauss},
        "torch": [_text(generator.numpy().tobytes()) for generator in _core.random_state(_device())],
    }
    try:
        import numpy

        name, key, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = {
            "name": str(name),
            "key": _text(key.astype("<u4").tobytes()),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        }
    except ImportError:
        pass
    return state


def _device():
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _tensor(text):
    data = bytearray(base64.b64decode(text))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def restore(state):
    """Puts the generators where capture() found them."""
    words = array("I")
    words.frombytes(base64.b64decode(state["python"]["words"]))
    random.setstate((state["python"]["version"], tuple(words), state["python"]["gauss"]))
    if "numpy" in state:
        import numpy

        saved = state["numpy"]
        key = numpy.frombuffer(base64.b64decode(saved["key"]), dtype="<u4")
        numpy.random.set_state((saved["name"], key, saved["position"], saved["has_gauss"], saved["gauss"]))
    _core.set_random_state([_tensor(generator) for generator in state["torch"]], _device())
