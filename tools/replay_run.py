"""Make the first updates of a recorded run again in other parallel layouts, and compare metrics with the run's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

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
    from fipo_megatron.trainer.layout_check import LAYOUTS

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

    from fipo_megatron.config.schema import Config
    from fipo_megatron.data.load import load_files
    from fipo_megatron.observability.metrics import read_metrics
    from fipo_megatron.observability.progress import Progress, print_table
    from fipo_megatron.trainer.launch import initial_policy
    from fipo_megatron.trainer.replay import compare_metrics, load_recorded_steps, replay

    try:
        if options.steps < 1:
            raise ValueError(f"--steps {options.steps}: must be at least 1")
        recorded, batches = load_recorded_steps(options.run, options.steps)
        base, _ = initial_policy(recorded, load_files(recorded.data))
        metrics = read_metrics(options.run / "metrics.jsonl")[1 : options.steps + 1]
        if not (base / "config.json").is_file():
            raise ValueError(f"{base}, the base policy of {options.run}, is gone; train the run again")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows, ok = [], True
    with Progress() as progress, progress.task("replay", len(options.layouts)) as advance:
        for layout in options.layouts:
            config = Config.model_validate({**recorded.model_dump(), "parallel": LAYOUTS[layout]})
            try:
                errors = compare_metrics(replay(config, batches, base), metrics)
            except RuntimeError as error:
                print(f"replay_run: {layout}: {error}", file=sys.stderr)
                ok = False
                continue
            ok = ok and errors.ok
            figures = [f"{errors.values[name]:.1e}" for name in ("train/loss", "train/grad_norm", errors.worst)]
            rows.append((layout, "yes" if errors.ok else "NO", *figures, errors.worst, f"{errors.moved_tokens:.1f}"))
            advance(layout)
    title = f"{options.steps} steps of {options.run.resolve().name}, made again: largest differences of its metrics"
    print_table(title, ("layout", "equal", "loss", "gradient norm", "worst", "metric", "tokens moved"), rows)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
