"""The states of the random number generators as JSON: no pickle, readable by anyone."""

import base64
import random
from array import array

import torch

from ..engine import _core


def _text(data):
    return base64.b64encode(data).decode()


def capture():
    """This process's generators: Python, NumPy (when it is there), torch on the CPU and on the current GPU."""
    version, words, gauss = random.getstate()
    state = {
        "python": {"version": version, "words": _text(array("I", words).tobytes()), "gauss": gauss},
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
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
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy().tobytes())
    # Streams of the engine's own, for what ranks must not draw alike.
    state["engine"] = [_text(stream.numpy().tobytes()) for stream in _core.random_state(_device())]
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
    torch.set_rng_state(_tensor(state["torch"]))
    if "numpy" in state:
        import numpy

        saved = state["numpy"]
        key = numpy.frombuffer(base64.b64decode(saved["key"]), dtype="<u4")
        numpy.random.set_state((saved["name"], key, saved["position"], saved["has_gauss"], saved["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))
    _core.set_random_state([_tensor(stream) for stream in state["engine"]], _device())
