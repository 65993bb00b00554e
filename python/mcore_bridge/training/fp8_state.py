"""What delayed FP8 scaling remembers, as JSON: per layer of the whole model the largest magnitudes of the last steps."""

import base64
import json

import torch

from ..engine import _core
from ..model import engines

FILE = "training_state/fp8.json"


def capture(models):
    """This rank's layers; empty without delayed scaling. Ranks that hold the same layer hold the same numbers."""
    return {
        name: {"steps": values.shape[1], "float32": base64.b64encode(values.cpu().contiguous().numpy().tobytes()).decode()}
        for name, values in _core.fp8_history(engines(models)).items()
    }


def text(captured):
    """The file's content from what all ranks captured."""
    layers = {name: layer for rank in captured for name, layer in rank.items()}
    return json.dumps(layers) + "\n"


def restore(models, content):
    values = {
        name: torch.frombuffer(bytearray(base64.b64decode(layer["float32"])), dtype=torch.float32).view(-1, layer["steps"])
        for name, layer in json.loads(content).items()
    }
    _core.set_fp8_history(engines(models), values)
