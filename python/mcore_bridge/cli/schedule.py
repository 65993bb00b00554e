"""mcore-bridge schedule: a pipeline schedule as text and as a chart, without a model."""

from .arguments import ScheduleArguments, parse

# What a computation looks like: letter in text, colour in the chart (a darker one for every further chunk).
KINDS = {
    "forward": ("F", "#4c78a8", "forward"),
    "backward": ("B", "#59a14f", "backward"),
    "backward_input": ("I", "#59a14f", "backward, inputs"),
    "backward_weight": ("W", "#b07aa1", "backward, weights"),
}
WIDEST = 4000  # characters of a text line; beyond, only the numbers are printed


def simulated(arguments):
    """(table, simulation) of a command line."""
    from ..engine import _core

    table = _core.make_schedule(
        arguments.pipeline_schedule,
        arguments.pipeline_model_parallel_size,
        arguments.virtual_pipeline_model_parallel_size or 1,
        arguments.micro_batches,
        arguments.microbatch_group_size_per_vp_stage or 0,
    )
    costs = [arguments.forward_cost, arguments.backward_input_cost, arguments.backward_weight_cost, arguments.exchange_cost]
    for cost in costs:
        if not 0 <= cost < float("inf"):
            raise ValueError(f"a cost of {cost} is not a time")
    if sum(costs[:3]) == 0:
        raise ValueError("all costs are 0")
    return table, _core.simulate_schedule(table, *costs)


def label(span, chunks):
    """F3 is the forward of micro-batch 3; with several chunks a letter follows: F3a on the first one."""
    return f"{KINDS[span.kind][0]}{span.micro_batch}" + (chr(ord("a") + span.chunk) if chunks > 1 else "")


def gantt(simulation, stages, chunks):
    """One line per stage; a column is the shortest cost, or as wide as the labels need."""
    spans = simulation.spans
    shortest = min(span.end - span.start for span in spans if span.end > span.start)
    room = max(len(label(span, chunks)) for span in spans) + 1
    per_time = room / shortest
    width = round(simulation.time * per_time)
    if width > WIDEST:
        return None
    lines = [[" "] * (width + 1) for _ in range(stages)]
    for span in spans:
        start, end = round(span.start * per_time), round(span.end * per_time)
        text = ("|" + label(span, chunks)).ljust(end - start, "." if end - start > room else " ")[: end - start]
        lines[span.stage][start:end] = text
        lines[span.stage][end] = "|"
    return "\n".join(f"{stage:3} {''.join(line)}" for stage, line in enumerate(lines))


def draw(charts, file):
    """Charts below one another, each (title, simulation, stages, chunks), to the same scale of time."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    heights = [stages for _, _, stages, _ in charts]
    figure, axes = pyplot.subplots(
        len(charts), 1, squeeze=False, figsize=(11, 0.6 + sum(0.28 * height + 0.75 for height in heights)),
        gridspec_kw=dict(height_ratios=heights),
    )  # fmt: skip
    longest = max(simulation.time for _, simulation, _, _ in charts)
    used = []
    for axis, (title, simulation, stages, chunks) in zip(axes[:, 0], charts, strict=True):
        few = len(simulation.spans) / stages <= 72
        for span in simulation.spans:
            _, colour, name = KINDS[span.kind]
            if name not in used:
                used.append(name)
            alpha = 1 - 0.55 * span.chunk / max(1, chunks)
            axis.barh(
                span.stage, span.end - span.start, left=span.start, height=0.92, color=colour, alpha=alpha, edgecolor="white",
                linewidth=0.6,
            )  # fmt: skip
            if few:
                axis.text(
                    (span.start + span.end) / 2,
                    span.stage,
                    str(span.micro_batch),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white",
                )
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlim(0, longest)
        axis.set_ylim(stages - 0.5, -0.5)
        axis.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)], fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel("time", fontsize=8)
    patches = [Patch(color=colour, label=name) for _, colour, name in KINDS.values() if name in used]
    figure.legend(handles=patches, ncols=len(patches), loc="lower right", fontsize=8, frameon=False)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=100)
    except ValueError as error:
        raise ValueError(f"--plot {file}: {error}") from None
    pyplot.close(figure)


def describe(message):
    what = f"{'gradient' if message.gradient else 'activation'} of chunk {message.chunk}, micro-batch {message.micro_batch}"
    return f"{'send' if message.send else 'receive'} {what} {'to' if message.send else 'from'} {message.peer}"


def run(command, argv):
    arguments = parse(ScheduleArguments, command, argv)
    table, simulation = simulated(arguments)
    stages, chunks = arguments.pipeline_model_parallel_size, arguments.virtual_pipeline_model_parallel_size or 1
    name = "interleaved 1f1b" if chunks > 1 else arguments.pipeline_schedule
    title = (
        f"{name}, {stages} stages" + (f" x {chunks} chunks" if chunks > 1 else "") + f", {arguments.micro_batches} micro-batches"
    )
    print(f"{title}: time {simulation.time:g}, bubble {simulation.bubble_fraction:.1%}")
    peaks = ", ".join(map(str, simulation.peak_activations))
    print(f"most (chunk, micro-batch) pairs whose activations live at once, by stage: {peaks}")
    text = gantt(simulation, stages, chunks)
    print(text if text is not None else "(too long for text; --plot FILE draws it)")
    if arguments.table:
        for stage, row in enumerate(table):
            print(f"stage {stage}")
            for action in row:
                if action.messages:
                    print(f"  {action.kind}: " + "; ".join(map(describe, action.messages)))
                else:
                    print(f"  {action.kind} chunk {action.chunk} micro-batch {action.micro_batch}")
    if arguments.plot:
        draw([(f"{title}: bubble {simulation.bubble_fraction:.1%}", simulation, stages, chunks)], arguments.plot)
    return 0
