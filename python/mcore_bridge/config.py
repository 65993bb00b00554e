"""ModelConfig: the engine's model description as a Python object."""

import json
from functools import cache

import torch

from .engine import _core

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@cache
def config_fields():
    """Every field as a dict of name, type, default and doc, in the order of declaration."""
    return tuple(json.loads(_core.config_fields()))


def _plain(value):
    """A value as JSON can hold it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


class ModelConfig:
    """What a model is and how it is split. Takes the fields of `config_fields()` by keyword; every value is checked.

    Raises ValueError for a bad or contradictory value and KeyError for an unknown field. Setting an attribute checks again;
    models that exist already do not change.
    """

    def __init__(self, *, hf_config=None, **fields):
        set_ = super().__setattr__
        set_("hf_config", hf_config)
        set_("_given", {key: _plain(value) for key, value in fields.items()})
        set_("_bridge", None)
        self._rebuild()

    def _rebuild(self):
        engine = _core.ModelConfig.from_json(json.dumps(self._given))
        super().__setattr__("engine", engine)
        super().__setattr__("_values", json.loads(engine.to_json()))

    def __getattr__(self, name):
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"ModelConfig has no field '{name}'")
        value = values[name]
        return _DTYPES[value] if name == "params_dtype" else value

    def __setattr__(self, name, value):
        if name in self._values:
            before = dict(self._given)
            self._given[name] = _plain(value)
            try:
                self._rebuild()
            except Exception:
                super().__setattr__("_given", before)
                raise
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo):
        copy = ModelConfig(hf_config=self.hf_config, **self._given)
        object.__setattr__(copy, "_bridge", self.bridge)
        return copy

    def __repr__(self):
        return f"ModelConfig({', '.join(f'{key}={value!r}' for key, value in self._values.items())})"

    def to_dict(self):
        """Every field with its final value, JSON types only."""
        return dict(self._values)

    @property
    def bridge(self):
        if self._bridge is None:
            from .bridge import GPTBridge

            super().__setattr__("_bridge", GPTBridge(self))
        return self._bridge

    is_multimodal = False
    support_multimodal = False

    @property
    def is_moe_model(self):
        return self.num_moe_experts is not None


def hf_to_mcore_config(hf_config):
    """ModelConfig fields (to be expanded with **) from a Transformers config, a dict, or the path of a folder or config.json."""
    import os

    if isinstance(hf_config, (str, os.PathLike)):
        path = os.path.join(hf_config, "config.json") if os.path.isdir(hf_config) else hf_config
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        hf_config = None
    else:
        values = hf_config if isinstance(hf_config, dict) else hf_config.to_dict()
    fields = json.loads(_core.hf_to_mcore_config(json.dumps(values, default=str)))
    if hf_config is not None and not isinstance(hf_config, dict):
        fields["hf_config"] = hf_config
    return fields
