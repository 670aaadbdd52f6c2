"""Make the first updates of a recorded run again in other parallel layouts, and compare metrics with the run's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fipo_megatron.config.schema import Config
    from fipo_megatron.observability.progress import Progress
    from fipo_megatron.trainer.replay import RecordedRun

EXAMPLES = """\
examples:
  tools/replay_run.py runs/quickstart_cpu-seed0
  tools/replay_run.py runs/quickstart_cpu-seed0 --layouts tp2_cp2_sp dp2_plain_optimizer --steps 2

The samples are the run's own, so no engine is started; the ranks are local processes over gloo. The run must have
written all samples of a step (run.sample_groups), as the quickstart does. Equal: metrics differ by at most 1e-4; shares
of tokens (_frac), which a threshold tells apart, by 8 tokens ("tokens moved").
exit status: 0 all metrics are equal, 1 a difference above the tolerance or a rank failed, 2 unusable arguments
"""
DEFAULT_LAYOUTS = ["tp1", "pp2", "cp2", "dp2"]


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    from fipo_megatron.trainer.layouts import LAYOUTS

    parser = argparse.ArgumentParser(
        prog="replay_run", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=LAYOUTS,
        default=DEFAULT_LAYOUTS,
        metavar="L",
        help=f"default: {' '.join(DEFAULT_LAYOUTS)}; known: {' '.join(LAYOUTS)}",
    )
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="the first N steps (default: 5)")
    options = parser.parse_args(arguments)

    from fipo_megatron.observability.progress import Progress
    from fipo_megatron.trainer.replay import load_recorded_run

    try:
        recorded = load_recorded_run(options.run, options.steps)
        configs = {layout: recorded.in_layout(layout) for layout in options.layouts}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with Progress() as progress:
        return 0 if replay_layouts(recorded, configs, progress) else 1


def replay_layouts(recorded: RecordedRun, configs: dict[str, Config], progress: Progress) -> bool:
    """Make the updates in each layout and print a table; whether all metrics are equal."""
    from fipo_megatron.observability.progress import print_table
    from fipo_megatron.trainer.replay import compare_metrics, replay

    rows, ok = [], True
    with progress.task("replay", len(configs)) as advance:
        for layout, config in configs.items():
            try:
                errors = compare_metrics(replay(config, recorded.batches, recorded.base), recorded.metrics)
            except RuntimeError as error:
                print(f"replay_run: {layout}: {error}", file=sys.stderr)
                ok = False
                continue
            ok = ok and errors.ok
            figures = [f"{errors.values.get(name, 0):.1e}" for name in ("train/loss", "train/grad_norm", errors.worst)]
            rows.append((layout, "yes" if errors.ok else "NO", *figures, errors.worst, f"{errors.moved_tokens:.1f}"))
            advance(layout)
    title = f"{len(recorded.batches)} steps of {recorded.name}, made again: largest differences of its metrics"
    print_table(title, ("layout", "equal", "loss", "gradient norm", "worst", "metric", "tokens moved"), rows)
    return ok


if __name__ == "__main__":
    sys.exit(main())
