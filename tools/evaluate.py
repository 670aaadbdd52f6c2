"""Greedy held-out accuracy of finished runs, their exported hf/ folders loaded by transformers alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = """\
example:
  tools/evaluate.py runs/quickstart_cpu-seed0 runs/quickstart_cpu-seed1
"""


def main() -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    arguments = parser.parse_args()
    from fipo_megatron.observability.metrics import read_metrics
    from fipo_megatron.observability.progress import Progress, print_table
    from fipo_megatron.trainer.launch import evaluate_exported

    rows = []
    try:
        with Progress() as progress, progress.task("evaluate", len(arguments.runs)) as advance:
            for run in arguments.runs:
                exported = evaluate_exported(run)
                measured = [line for line in read_metrics(run / "metrics.jsonl") if "eval/greedy_accuracy" in line]
                first, last = measured[0], measured[-1]
                seconds = sum(line["time/step_s"] for line in read_metrics(run / "metrics.jsonl"))
                rows.append(
                    (
                        run.name,
                        f"{first['eval/sampled_accuracy']:.3f} -> {last['eval/sampled_accuracy']:.3f}",
                        f"{first['eval/greedy_accuracy']:.3f} -> {last['eval/greedy_accuracy']:.3f}",
                        f"{exported['accuracy']:.3f}",
                        f"{seconds:.0f} s",
                    )
                )
                advance(run.name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table("held-out accuracy", ("run", "sampled", "greedy", "greedy, transformers", "training"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
