"""mcore-bridge <command>: dispatches, relaunches under torchrun when asked, turns errors into one message."""

import importlib
import os
import sys

COMMANDS = {
    "sft": ("train", "fine-tune on conversations (full or LoRA)"),
    "pt": ("train", "train on plain text"),
    "export": ("export", "merge, cast, re-shard, (de)quantise a checkpoint; to and from Megatron's"),
    "verify": ("verify", "compare the engine's logits with Transformers'"),
    "diff": ("diff", "compare two checkpoints tensor by tensor"),
    "plan": ("plan", "memory, communication and time of a run, and its best layouts, from config.json alone"),
    "inspect": ("inspect", "show the layout of a checkpoint without loading it"),
    "schedule": ("schedule", "show a pipeline schedule, its bubble and its peak activations"),
}

# Commands of one process: threads do their work, and no model is split.
ALONE = ("export", "diff", "plan", "inspect", "schedule")


def usage():
    lines = ["usage: mcore-bridge <command> [config.yaml] [--flag value ...]", "", "commands:"]
    lines += [f"  {name:8} {text}" for name, (_, text) in COMMANDS.items()]
    lines += [
        "",
        "mcore-bridge <command> --help explains every flag.",
        "Several processes: NPROC_PER_NODE=4 mcore-bridge sft ... relaunches itself through torchrun (NNODES, NODE_RANK,",
        "MASTER_ADDR and MASTER_PORT as usual); torchrun --nproc_per_node 4 -m mcore_bridge sft ... does the same.",
    ]
    return "\n".join(lines)


def main(argv=None):
    """Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from .. import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"mcore-bridge: '{argv[0]}' is no command\n\n{usage()}", file=sys.stderr)
        return 2
    from .launch import relaunch

    wants_help = any(word in ("-h", "--help") for word in argv[1:])
    if not wants_help and argv[0] not in ALONE:
        code = relaunch(argv)
        if code is not None:
            return code
    command = importlib.import_module(f".{COMMANDS[argv[0]][0]}", __package__)
    try:
        return command.run(argv[0], argv[1:])
    except (ValueError, KeyError, FileNotFoundError, OSError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("LOG_LEVEL", "").upper() == "DEBUG":
            raise
        from .failures import fail

        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
