"""Make the updates of a recorded step again, in the run's layout or others, and compare what they give."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fipo_megatron.config.schema import Config
    from fipo_megatron.observability.progress import Progress
    from fipo_megatron.trainer.replay import RecordedSteps

EXAMPLES = """\
examples:
  tools/replay_step.py runs/quickstart_cpu-seed0
  tools/replay_step.py runs/quickstart_cpu-seed0 --step 5 --layouts same pp2 tp2_cp2_sp

The step's inputs are those in RUN/replay (checkpoint.replay_every_steps), so no engine is started; the ranks are local
processes. The policy is that of the newest whole checkpoint before the step, or the base policy, and the steps from
there on are made again, too. Equal in the run's own layout ("same"): log-probs before and after, statistics and
gradient norm of every update are the recorded ones bit for bit. In another: metrics and the mean log-prob differ by at
most 1e-4; shares of tokens (_frac), which a threshold tells apart, by 8 tokens ("tokens moved").
exit status: 0 all is equal, 1 a difference or a rank failed, 2 unusable arguments
"""
SAME = "same"
SHOWN = ("train/loss", "train/grad_norm", "new log-probs")


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    from fipo_megatron.trainer.layouts import LAYOUTS

    parser = argparse.ArgumentParser(
        prog="replay_step.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest of which there is a replay file")
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=[SAME, *LAYOUTS],
        default=[SAME],
        metavar="L",
        help=f"default: {SAME}, that of the run; known: {' '.join(LAYOUTS)}",
    )
    options = parser.parse_args(arguments)

    from fipo_megatron.observability.progress import Progress
    from fipo_megatron.trainer.replay import load_recorded_steps

    try:
        recorded = load_recorded_steps(options.run, options.step)
        configs = {layout: recorded.in_layout(layout) for layout in options.layouts}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in recorded.start.notes:
        print(f"not used: {note}", file=sys.stderr)
    with Progress() as progress:
        return 0 if replay_layouts(recorded, configs, progress) else 1


def replay_layouts(recorded: RecordedSteps, configs: dict[str, Config], progress: Progress) -> bool:
    """Make the updates in each layout and print a table; whether all is equal."""
    from fipo_megatron.observability.progress import print_table
    from fipo_megatron.trainer.replay import compare_replay, replay

    rows, ok = [], True
    with progress.task("replay", len(configs)) as advance:
        for layout, config in configs.items():
            try:
                errors = compare_replay(config, replay(config, recorded), recorded)
            except RuntimeError as error:
                print(f"replay_step: {layout}: {error}", file=sys.stderr)
                ok = False
                continue
            ok = ok and errors.ok
            figures = [f"{errors.values.get(name, 0):.1e}" for name in (*SHOWN, errors.worst)]
            if errors.exact and not errors.ok:
                print(
                    f"replay_step: {layout}: the first difference is in the {errors.first_difference}", file=sys.stderr
                )
            equal = "NO" if not errors.ok else "bit for bit" if errors.first_difference is None else "yes"
            rows.append((layout, equal, *figures, errors.worst, f"{errors.moved_tokens:.1f}"))
            advance(layout)
    first, last = recorded.steps[0].step, recorded.steps[-1].step
    which = f"step {last}" if first == last else f"steps {first} to {last}"
    whence = f"the checkpoint of step {recorded.start.step}" if recorded.start.step else "the base policy"
    title = f"{recorded.name}: {which} made again from {whence}, largest differences"
    headers = ("layout", "equal", "loss", "gradient norm", "new log-probs", "worst", "of", "tokens moved")
    print_table(title, headers, rows)
    return ok


if __name__ == "__main__":
    sys.exit(main())
