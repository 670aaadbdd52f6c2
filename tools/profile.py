"""Profile steps of a real run: where their time and memory went, on driver, ranks and engines."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fipo_megatron.config.schema import Config
    from fipo_megatron.data.load import ProblemFiles
    from fipo_megatron.observability.progress import Progress
    from fipo_megatron.trainer.profile import Profile

if __name__ == "profile":
    # Scripts here, and the workers of their runs, look for modules in tools/ first. Who imports the standard library's
    # `profile`, as cProfile does, and torch by it, finds this file, and is given what it wanted.
    _spec = importlib.util.spec_from_file_location("profile", Path(sysconfig.get_path("stdlib"), "profile.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["profile"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["profile"])

EXAMPLES = """\
examples:
  tools/profile.py configs/quickstart_cpu.yaml
  tools/profile.py configs/quickstart_cpu.yaml --steps 5 --out runs/profile parallel.tensor=1 parallel.pipeline=2
  tools/profile.py configs/quickstart_cpu.yaml --steps 1 --trace
  tools/profile.py configs/quickstart_cpu.yaml --pairs 20

Trains as tools/train.py does: one step to warm up, then those that are reported. The run's folder gets
profile/report.html, a page with a timeline that needs no network; profile.json, the numbers; and timeline.json, for
Perfetto or chrome://tracing. docs/profiling.md says how to read them, and what each number is.

exit status: 0 profiled, 1 a failure in the run, 2 refused before a process started, 130 interrupted
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    options = make_parser().parse_intermixed_args(arguments)
    from fipo_megatron.trainer.interrupts import catch_interrupts

    try:
        profile_run(options, catch_interrupts())
    except KeyboardInterrupt:
        print("interrupted; all worker processes have ended", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        print(f"error: {type(error).__name__}: {error} {notes}".rstrip(), file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, e.g. configs/quickstart_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="that are reported (default: 3)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the run's folder (default: runs/<config>-profile-seed<seed>)"
    )
    parser.add_argument("--trace", action="store_true", help="torch's profiler: a trace of these steps for each rank")
    parser.add_argument(
        "--memory-snapshot", action="store_true", help="CUDA: what torch's allocator did in them, for each rank"
    )
    parser.add_argument("--nsys", action="store_true", help="CUDA: ranges for nsys, see docs/profiling.md")
    parser.add_argument(
        "--pairs",
        type=int,
        default=0,
        metavar="N",
        help="at the end N gradients with recording and N without, in turns: what it costs (default: 0)",
    )
    return parser


def profile_run(options: argparse.Namespace, interrupts: Sequence[int]) -> None:
    """Runs, records, prints the tables and says where the report is.

    Raises:
        ValueError: what refuses it before a process starts.
    """
    from fipo_megatron.config.load import load_config
    from fipo_megatron.observability.progress import Progress, print_table
    from fipo_megatron.trainer.launch import check_before_start
    from fipo_megatron.trainer.profile import FOLDER, WARM_UP_STEPS, write_report

    for name, least in (("steps", 1), ("pairs", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} {getattr(options, name)}: must be at least {least}")
    if any(override.startswith("trainer.steps=") for override in options.overrides):
        raise ValueError(f"trainer.steps: a profile makes {WARM_UP_STEPS} to warm up and those that --steps asks for")
    # No checkpoint unless one is asked for: of a large model it takes longer than the steps.
    settings = ["checkpoint.every_steps=0", *options.overrides, f"trainer.steps={WARM_UP_STEPS + options.steps}"]
    if options.out is not None:  # as text, also where it could be a number
        root, name = (json.dumps(str(text), ensure_ascii=False) for text in (options.out.parent, options.out.name))
        settings += [f"run.root={root}", f"run.name={name}"]
    config = load_config(options.config, settings)
    files = check_before_start(config)
    name = f"{Path(options.config).stem}-profile"
    with Progress() as progress:
        folder, profile = train(options, config, files, name, progress, interrupts)
    assert profile.result is not None
    assert profile.model_shape is not None
    try:
        tables = write_report(profile.result, profile.model_shape, folder / FOLDER)
    except ValueError as error:  # which refuses nothing any more
        raise RuntimeError(f"{folder / FOLDER}: no report: {error}") from error
    for table in tables:
        print_table(table.title, table.header, table.rows)
    print(f"report: {folder / FOLDER / 'report.html'}")


def train(
    options: argparse.Namespace,
    config: Config,
    files: ProblemFiles,
    name: str,
    progress: Progress,
    interrupts: Sequence[int],
) -> tuple[Path, Profile]:
    """The folder of a run, and what was recorded of it."""
    from fipo_megatron.model.platform import resolve_platform
    from fipo_megatron.trainer.interrupts import run_interruptibly
    from fipo_megatron.trainer.launch import plan_training, run_training
    from fipo_megatron.trainer.profile import FOLDER, WARM_UP_STEPS, Profile
    from fipo_megatron.trainer.profiled_policy import ProfileSettings
    from fipo_megatron.trainer.run_folder import locked, make_run_folder

    settings = ProfileSettings(
        folder=Path(),  # known when the run has one
        after=WARM_UP_STEPS,
        num_steps=options.steps,
        num_pairs=options.pairs,
        trace=options.trace,
        memory_snapshot=options.memory_snapshot,
        nsys=options.nsys,
    )
    settings.check(resolve_platform(config.platform).name)
    with tempfile.TemporaryDirectory(prefix="fipo-") as scratch:
        plan = plan_training(config, files, Path(scratch), progress)
        folder = make_run_folder(config, name)
        profile = Profile(config, replace(settings, folder=(folder / FOLDER).absolute()))
        with locked(folder):
            progress.note(f"run folder: {folder}")
            try:
                training = run_training(plan, folder, progress, Event(), profile)
                asyncio.run(run_interruptibly(training, interrupts))
            except Exception as error:
                (folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
                print(f"traceback: {folder / 'error.log'}", file=sys.stderr)
                if isinstance(error, ValueError):  # which refuses nothing any more
                    raise RuntimeError(str(error)) from error
                raise
    return folder, profile


if __name__ == "__main__":
    sys.exit(main())
