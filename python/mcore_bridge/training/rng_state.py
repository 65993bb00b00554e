"""The states of the random number generators as JSON: no pickle, readable by anyone."""

import base64
import random
from array import array

import torch


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
    return state


def _tensor(text):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


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
