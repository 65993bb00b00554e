"""What a run costs before anything is built: memory, communication, time; and the layouts that serve it best."""

import json

from .engine import _core


def _lora(options):
    return None if options is None else options.engine()


def plan_layout(config, *, lora=None, **request):
    """The plan of the layout in `config` (a ModelConfig) as a dict.

    request: processes, micro_batch_size, global_batch_size, sequence_length; optionally documents (per packed row),
    frozen (prefixes), optimizer (a dict of Trainer options), memory (bytes per GPU), reserve, margin, gpu_kernels, hardware (a dict of the
    fields of Hardware in mcore_bridge/planner.h; name picks a row of its table). lora: LoraOptions. Nothing is built or read."""
    return json.loads(_core.plan_layout(config.engine, json.dumps(request), _lora(lora)))


def nearest_fitting(config, *, lora=None, **request):
    """The plan nearest to the one asked for that fits into memory; None when nothing does. Arguments as plan_layout."""
    return json.loads(_core.nearest_fitting(config.engine, json.dumps(request), _lora(lora)))


def search_layouts(config, *, fixed=(), count=5, lora=None, **request):
    """Plans of the best layouts, best first: those that fit, fastest first, then the others, smallest first. `fixed`: names of
    the sizes that stay as `config` and `request` have them."""
    request["fixed"] = {name: True for name in fixed}
    return json.loads(_core.search_layouts(config.engine, json.dumps(request), _lora(lora), count))


def check_layout(fields, **run):
    """ValueError, the same on every rank, when ModelConfig `fields` cannot be split as they say, or the run's processes,
    micro_batch_size, global_batch_size or sequence_length do not fit; it names the nearest layout that works."""
    from .config import _plain

    _core.check_layout(json.dumps({key: _plain(value) for key, value in fields.items()}), json.dumps(run))
