"""Look at what the policy wrote: a page in which every token is coloured by influence weight, advantage or log-prob."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fipo_megatron.config.schema import Config
    from fipo_megatron.observability.sample_viewer import StepSamples

EXAMPLES = """\
examples:
  tools/view_samples.py runs/quickstart_cpu-seed0
  tools/view_samples.py runs/quickstart_cpu-seed0 --step 1 --step 40 --groups 32 --out first_and_last.html

The page is one file (default: samples.html in the run folder) that loads nothing: open it in any browser, or send it.
Without --step it holds the first, the last and some steps between them.
"""

DEFAULT_STEPS, DEFAULT_GROUPS = 6, 8


def main() -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, action="append", metavar="N", help="a step to show; may be repeated")
    parser.add_argument("--groups", type=int, default=DEFAULT_GROUPS, metavar="N", help="groups a step (default: 8)")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page (default: samples.html in the run)")
    options = parser.parse_args()
    out = options.out or options.run / "samples.html"
    try:
        if options.groups < 1:
            raise ValueError(f"--groups {options.groups}: must be at least 1")
        from fipo_megatron.config.load import load_config
        from fipo_megatron.observability.sample_viewer import load_token_texts, render_page

        recorded = find_steps(options.run)
        steps = read_steps(options.run, recorded, choose_steps(sorted(recorded), options.step))
        config = load_config(options.run / "config.yaml")
        texts = load_token_texts(find_tokenizer(options.run, config))
        name, algorithm = options.run.resolve().name, config.algorithm.describe()
        out.write_text(render_page(name, algorithm, steps, texts, options.groups), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: steps {', '.join(str(step.step) for step in steps)}; {out.stat().st_size / 1e6:.1f} MB")
    return 0


def find_steps(run: Path) -> dict[int, Path]:
    """The samples file of each recorded step; a folder without any is a ValueError."""
    from fipo_megatron.observability.samples import SAMPLES_FOLDER

    paths = {int(path.stem.removeprefix("step_")): path for path in (run / SAMPLES_FOLDER).glob("step_*.jsonl")}
    if not paths:
        raise ValueError(
            f"{run}: no samples; give the folder of a run that made a step, with run.sample_groups above 0"
        )
    return paths


def choose_steps(recorded: list[int], asked: list[int] | None) -> list[int]:
    """The steps asked for, else up to six from the first to the last, evenly; one not recorded is a ValueError."""
    for step in asked or ():
        if step not in recorded:
            raise ValueError(
                f"--step {step}: not recorded; the run has samples of steps {recorded[0]} to {recorded[-1]}"
            )
    if asked:
        return sorted(set(asked))
    last = len(recorded) - 1
    num_steps = min(DEFAULT_STEPS, len(recorded))
    return [recorded[round(i * last / max(num_steps - 1, 1))] for i in range(num_steps)]


def read_steps(run: Path, paths: dict[int, Path], steps: list[int]) -> list[StepSamples]:
    """The samples of the steps, each with its metrics in a line."""
    from fipo_megatron.observability.metrics import read_metrics
    from fipo_megatron.observability.sample_viewer import StepSamples
    from fipo_megatron.observability.samples import read_samples

    metrics = {line["step"]: line for line in read_metrics(run / "metrics.jsonl")}
    return [StepSamples(step, summarize(metrics.get(step, {})), read_samples(paths[step])) for step in steps]


def summarize(metrics: Mapping[str, float]) -> str:
    """A step's metrics in a line, and how many of its groups the run wrote."""
    from fipo_megatron.observability.live_panel import step_summary

    keys = ("rollout/recorded_groups", "rollout/trained_groups")
    recorded = ["written {} of {} groups".format(*(metrics[key] for key in keys))] if keys[0] in metrics else []
    return "  ".join([step_summary(metrics), *recorded])


def find_tokenizer(run: Path, config: Config) -> Path:
    """A folder with the run's tokenizer: its own hf/, or where its policy began."""
    if (run / "hf" / "config.json").is_file():
        return run / "hf"
    from fipo_megatron.data.load import load_files
    from fipo_megatron.trainer.launch import initial_policy

    start, _ = initial_policy(config, load_files(config.data))
    if (start / "config.json").is_file():
        return start
    raise ValueError(f"{run}: no tokenizer in {run / 'hf'} or {start}; let the run finish, or restore its model.path")


if __name__ == "__main__":
    sys.exit(main())
