"""What a Megatron `torch_dist` folder looks like: which key of the checkpoint holds which parameter, and where.

Facts from megatron/core/dist_checkpointing and the modules' sharded_state_dict (Megatron-LM, core 0.16):

- A checkpoint is `<root>/iter_0000001/` (or `<root>/release/`), `<root>/latest_checkpointed_iteration.txt` names it. Inside: PyTorch
  distributed-checkpoint files (`.metadata`, `__N_M.distcp`), `metadata.json` ({"sharded_backend": "torch_dist", ...}) and
  `common.pt` (args, iteration, checkpoint_version 3.0).
- Layers of one kind are stacked: `decoder.layers.<rest>` has a leading axis of num_layers, each layer its own shard of size 1.
  Layers that differ (non_homogeneous_layers) keep their global number in the key: `decoder.layers.3.<rest>`.
- Experts have a further axis behind it: `decoder.layers.mlp.experts.experts.linear_fc1.weight` is [layers, experts, 2 * ffn, hidden].
- linear_fc1 of a gated MLP is [gate rows of all ranks; up rows of all ranks], whatever the tensor parallel size was. With
  singleton_local_shards the halves are keys of their own, `..._w` and `..._v`, and layers and experts keep numbers.
- linear_qkv is grouped per key/value head, the same for every tensor parallel size.
- The vocabulary is padded with rows (to a multiple of make_vocab_size_divisible_by x tensor parallel size); a loader takes any padding.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

LATEST = "latest_checkpointed_iteration.txt"
_LAYER = re.compile(r"^(decoder\.layers|mtp\.layers)\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^(.*mlp\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)$")


@dataclass(frozen=True)
class Place:
    """A parameter in the checkpoint: `key`, the leading indices of its slice, and the extents of those axes."""

    key: str
    index: tuple = ()
    axes: tuple = ()


def places(plans):
    """{parameter name: Place} of the plans (_core.parameter_plans) in the layout this version writes."""
    layers = {}
    experts = {}
    for plan in plans:
        if match := _LAYER.match(plan["name"]):
            layers.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tuple(plan["sizes"])
        if match := _EXPERT.match(plan["name"]):
            key = (match[1], match[2], match[3])
            experts[key] = max(experts.get(key, 0), int(match[4]) + 1)
    alike = {stack: len({tuple(sorted(layer.items())) for layer in found.values()}) == 1 for stack, found in layers.items()}
    result = {}
    for plan in plans:
        key, index, axes = plan["name"], (), ()
        expert = _EXPERT.match(key)
        if expert:
            key = f"{expert[1]}.experts.{expert[2]}.{expert[3]}"
        if (match := _LAYER.match(key)) and alike[match[1]]:
            key, index, axes = f"{match[1]}.{match[3]}", (int(match[2]),), (len(layers[match[1]]),)
        if expert:
            index, axes = (*index, int(expert[4])), (*axes, experts[expert[1], expert[2], expert[3]])
        result[plan["name"]] = Place(key, index, axes)
    return result


def candidates(name, place):
    """Where a checkpoint written elsewhere may keep a parameter: [[(key, index)], ...]; the parts of one candidate follow one
    another along the rows."""
    found = [[(place.key, place.index)]]
    layer = _LAYER.match(name)
    expert = _EXPERT.match(name)
    if layer and not expert:
        numbered = f"{layer[1]}.{layer[2]}.{layer[3]}"
        found += [[(numbered, ())], [(f"{numbered}_w", ()), (f"{numbered}_v", ())]]
        found.append([(f"{layer[1]}.{layer[3]}", (int(layer[2]),))])
    if expert:
        inner = _LAYER.match(expert[1])
        rest = f"experts.{expert[2]}.{expert[3]}"
        number = int(expert[4])
        prefix = f"{inner[1]}.{inner[2]}.{inner[3]}"
        found.append([(f"{prefix}.{rest}", (number,))])
        singleton = f"{prefix}.experts.{number}.{expert[2]}.{expert[3]}"
        found += [[(singleton, ())], [(f"{singleton}_w", ()), (f"{singleton}_v", ())]]
        found.append([(f"{inner[1]}.{inner[3]}.{rest}", (int(inner[2]), number))])
    return found


def locate(folder):
    """The folder with the `.metadata` of a checkpoint: `folder` itself, or the iteration its root names."""
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (root / ".metadata").exists():
        return root
    latest = root / LATEST
    if latest.exists():
        word = latest.read_text().strip()
        name = word if word == "release" else f"iter_{int(word):07d}" if word.isdigit() else None
        if name is None:
            raise ValueError(f"{latest}: '{word}' is neither an iteration nor 'release'")
        if not (root / name / ".metadata").exists():
            raise FileNotFoundError(f"{root / name}: holds no .metadata; {LATEST} names it (a torch_dist checkpoint is needed)")
        return root / name
    raise FileNotFoundError(
        f"{folder}: no Megatron torch_dist checkpoint (neither .metadata nor {LATEST}). Older formats (torch, zarr): load and save "
        "them in Megatron with --ckpt-format torch_dist"
    )


def side_folder(folder):
    """Where args.json, config.json and the tokenizer of a checkpoint lie: beside its iterations."""
    place = locate(folder)
    return place if (place / "config.json").exists() or not (place.parent / LATEST).exists() else place.parent


def saved_args(folder):
    """The content of args.json; empty when there is none."""
    for place in (locate(folder), side_folder(folder)):
        if (place / "args.json").exists():
            return json.loads((place / "args.json").read_text())
    return {}
