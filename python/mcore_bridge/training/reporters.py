"""Where numbers go besides the log: tensorboard, Weights & Biases, SwanLab. Each has write(step, {name: number}) and close()."""

from pathlib import Path

NAMES = ("tensorboard", "wandb", "swanlab")
DEFAULT_PROJECT = "megatron-swift"


class Tensorboard:
    def __init__(self, arguments, output_dir, resumed):
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier attempt wrote behind the step this one goes on from (all of it for a run from the beginning) stays in its
        # file, hidden.
        self.writer = SummaryWriter(arguments.tensorboard_dir or str(Path(output_dir) / "runs"), purge_step=resumed + 1)

    def write(self, step, numbers):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self):
        self.writer.close()


def earlier_run(output_dir, name, resumed):
    """The id under which a run that goes on was known to a service, and the file that remembers it."""
    file = Path(output_dir) / f".{name}-run"
    return file.read_text().strip() if resumed and file.is_file() else None, file


class Wandb:
    def __init__(self, arguments, output_dir, resumed):
        import wandb

        earlier, file = earlier_run(output_dir, "wandb", resumed)
        self.run = wandb.init(
            project=arguments.wandb_project or DEFAULT_PROJECT,
            name=arguments.wandb_exp_name or str(output_dir),
            dir=str(output_dir),
            config=vars(arguments),
            id=earlier,
            resume="allow" if earlier else None,
        )
        file.write_text(self.run.id)

    def write(self, step, numbers):
        self.run.log(numbers, step=step)

    def close(self):
        self.run.finish()


class Swanlab:
    def __init__(self, arguments, output_dir, resumed):
        import swanlab

        self.lab = swanlab
        earlier, file = earlier_run(output_dir, "swanlab", resumed)
        run = swanlab.init(
            project=arguments.swanlab_project or DEFAULT_PROJECT,
            experiment_name=arguments.swanlab_exp_name or str(output_dir),
            logdir=str(Path(output_dir) / "swanlog"),
            config=vars(arguments),
            **(dict(id=earlier, resume="allow") if earlier else {}),
        )
        file.write_text(run.id)

    def write(self, step, numbers):
        self.lab.log(numbers, step=step)

    def close(self):
        self.lab.finish()


def check(names):
    unknown = set(names) - {*NAMES, "none"}
    if unknown:
        raise ValueError(f"--report_to {' '.join(sorted(unknown))} is not supported by this version ({', '.join(NAMES)}, none)")


def open_all(arguments, output_dir, resumed):
    """The reporters asked for; one that is not installed is named and left out."""
    makers = {"tensorboard": Tensorboard, "wandb": Wandb, "swanlab": Swanlab}
    opened = []
    for name in arguments.report_to:
        if name == "none":
            continue
        try:
            opened.append(makers[name](arguments, output_dir, resumed))
        except ImportError:
            print(f"{name} is not installed: pip install {name}, or --report_to none silences this", flush=True)
    return opened
