"""The chart of docs/parallelism.md: draw_schedules.py FILE."""

import sys

from mcore_bridge.cli.arguments import ScheduleArguments
from mcore_bridge.cli.schedule import draw, simulated

STAGES, MICRO_BATCHES = 4, 8


def main(file):
    charts = []
    for title, options in (
        ("1F1B", {}),
        ("interleaved 1F1B, 2 chunks per stage (later chunk lighter)", dict(virtual_pipeline_model_parallel_size=2)),
        ("ZB-H1", dict(pipeline_schedule="zb-h1")),
    ):
        chunks = options.get("virtual_pipeline_model_parallel_size", 1)
        costs = {name: 1 / chunks for name in ("forward_cost", "backward_input_cost", "backward_weight_cost")}
        arguments = ScheduleArguments(pipeline_model_parallel_size=STAGES, micro_batches=MICRO_BATCHES, **costs, **options)
        _, simulation = simulated(arguments)
        charts.append((f"{title}: bubble {simulation.bubble_fraction:.1%}", simulation, STAGES, chunks))
    draw(charts, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
