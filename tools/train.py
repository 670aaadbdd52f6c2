"""Train a policy with FIPO (or DAPO, GRPO): one config is one run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from fipo_megatron.config.schema import Config
    from fipo_megatron.trainer.resume import Resumption

EXAMPLES = """\
examples:
  tools/train.py configs/quickstart_cpu.yaml
  tools/train.py configs/quickstart_cpu.yaml seed=1 trainer.steps=5
  tools/train.py configs/quickstart_cpu.yaml algorithm=dapo run.name=dapo
  tools/train.py configs/quickstart_cpu.yaml parallel='{tensor: 1, data: 2}'
  tools/train.py --resume runs/quickstart_cpu-seed0 trainer.steps=80
  tools/train.py configs/quickstart_cpu.yaml --resume auto
  tools/train.py configs/quickstart_cpu.yaml --dry-run

The run folder (runs/<config>-seed<seed>/) gets config.yaml, metrics.jsonl, curves.png, samples/ and hf/, a Hugging Face
folder of the trained policy. A failed run also leaves error.log, and the cause is the last line printed. However a run
ends, it says what is where, how to look at its samples and how to compare it.

A run saves checkpoints (checkpoint.every_steps); --resume goes on from the newest that is whole, and makes the same
steps as a run that was never stopped. SIGUSR1 ends a run after the step under way, with a checkpoint.

exit status: 0 trained, or a dry run found nothing, 1 a failure in the run, 2 refused before a process started,
75 stopped by SIGUSR1 (--resume goes on), 130 interrupted
"""

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later

CONTENTS = (
    ("config", "config.yaml"),
    ("curves", "curves.png"),
    ("policy", "hf"),
    ("checkpoints", "checkpoints"),
    ("held-out problems, one by one", "evaluation"),
    ("traceback", "error.log"),
    ("logs of the workers", "worker_logs"),
)


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    options = _make_parser().parse_intermixed_args(arguments)
    from fipo_megatron.trainer.interrupts import catch_interrupts

    interrupts = catch_interrupts()
    entered: list[Path] = []  # the run's folder, when nothing can refuse the run any more
    try:
        return _train(options, interrupts, entered)
    except KeyboardInterrupt:
        status, ending = 130, "interrupted; all worker processes have ended"
    except Exception as error:
        is_refusal = isinstance(error, ValueError) and not entered
        cause = str(error) if is_refusal else f"{type(error).__name__}: {error}"
        status, ending = 2 if is_refusal else 1, " ".join(["error:", cause, *getattr(error, "__notes__", [])])
        if not entered and not is_refusal:
            traceback.print_exc()
        for folder in entered:
            with contextlib.suppress(OSError):  # a full disk must not hide the cause
                (folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
    for number in interrupts:  # the ending is told to the end
        signal.signal(number, signal.SIG_IGN)
    for folder in entered:
        _print_contents(folder, sys.stderr)
    print(ending, file=sys.stderr)
    return status


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="YAML file, e.g. configs/quickstart_cpu.yaml; not with --resume RUN")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this folder; auto: with the newest run of the config's name, or anew",
    )
    parser.add_argument("--step", type=int, metavar="N", help="with --resume RUN: from this step's checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="check everything for all ranks, and start nothing")
    return parser


def _train(options: argparse.Namespace, interrupts: Sequence[int], entered: list[Path]) -> int:
    """Exit status of a run that ends well, or as it is asked to. Its folder is put into `entered`."""
    stop = Event()
    signal.signal(signal.SIGUSR1, lambda number, frame: stop.set())
    with contextlib.ExitStack() as stack:
        run = _choose_run(options, stack)
        if run is None:
            return 0
        config, name, resumed = run
        if options.dry_run:
            from fipo_megatron.trainer.dry_run import run_dry

            run_dry(config, Path(options.config).parent if resumed is None else resumed.folder)
            return 0
        from fipo_megatron.observability.progress import Progress
        from fipo_megatron.trainer.interrupts import run_interruptibly
        from fipo_megatron.trainer.launch import check_before_start, plan_training, run_training
        from fipo_megatron.trainer.run_folder import checkpoints_folder, go_on_in, locked, make_run_folder

        files = check_before_start(config, is_resumed=resumed is not None)
        progress = stack.enter_context(Progress())
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="fipo-"))
        plan = plan_training(config, files, Path(scratch), progress, resumed)
        del files  # gigabytes, where they are large
        folder = make_run_folder(config, name) if resumed is None else resumed.folder
        if resumed is None:
            stack.enter_context(locked(folder))
        if config.checkpoint.folder is not None:  # where a run of another root may write, too
            checkpoints_folder(config, folder).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(checkpoints_folder(config, folder)))
        entered.append(folder)  # nothing refuses the run any more
        progress.note(f"run folder: {folder}")
        if resumed is not None:
            for note in (*resumed.notes, *go_on_in(folder, config, resumed.step)):
                progress.note(note)
        last_step = asyncio.run(run_interruptibly(run_training(plan, folder, progress, stop), interrupts))
    if last_step < config.trainer.steps:
        _print_contents(folder, sys.stderr)
        command = _command("train.py", "--resume", str(_short(folder)))
        print(f"stopped after step {last_step}, as asked, with a checkpoint; go on: {command}", file=sys.stderr)
        return STOPPED
    _print_accuracies(folder)
    _print_contents(folder, sys.stdout)
    return 0


def _choose_run(
    options: argparse.Namespace, stack: contextlib.ExitStack
) -> tuple[Config, str, Resumption | None] | None:
    """Settings of the run, its name unless they have one, and what it goes on from, whose folder is locked in `stack`;
    None if there is nothing left to do. A ValueError where the arguments disagree."""
    from fipo_megatron.config.load import load_config

    path, overrides, resume = options.config, options.overrides, options.resume
    if options.step is not None and resume in (None, "auto"):
        raise ValueError(f"--step {options.step}: names a checkpoint of --resume RUN; give both, or neither")
    if resume is not None and resume != "auto":
        if path is not None and "=" not in path:
            raise ValueError(f"{path}: --resume {resume} has the run's own configuration; give one of the two")
        given = ([path] if path is not None else []) + overrides
        resumed = _resume(Path(resume), stack, overrides=given, step=options.step)
        return resumed.config, resumed.folder.name, resumed
    if path is None:
        raise ValueError("no configuration; give a YAML file, e.g. configs/quickstart_cpu.yaml, or --resume RUN")
    config, name = load_config(path, overrides), Path(path).stem
    if resume is None:
        return config, name, None
    from fipo_megatron.trainer.resume import CompleteError, find_run

    if config.run.overwrite:
        raise ValueError(
            "run.overwrite = true: replaces the run that --resume auto would go on with; give one of the two"
        )
    if (folder := find_run(config, name)) is None:
        return config, name, None
    try:
        return config, name, _resume(folder, stack, config)
    except CompleteError as complete:
        print(f"nothing to do: {complete}, or leave out --resume for a new run")
        return None


def _resume(folder: Path, stack: contextlib.ExitStack, *arguments: Any, **settings: Any) -> Resumption:
    """What `resume_run` finds in a folder that no other process changes any more."""
    from fipo_megatron.trainer.resume import resume_run
    from fipo_megatron.trainer.run_folder import locked

    if folder.is_dir():
        stack.enter_context(locked(folder))
    return resume_run(folder, *arguments, **settings)


def _print_accuracies(folder: Path) -> None:
    from fipo_megatron.observability.metrics import read_metrics
    from fipo_megatron.observability.progress import print_table

    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "eval/sampled_accuracy" in line]
    rows = [
        (name, f"{lines[0][f'eval/{name}_accuracy']:.3f}", f"{lines[-1][f'eval/{name}_accuracy']:.3f}")
        for name in ("sampled", "greedy")
        if f"eval/{name}_accuracy" in lines[0]
    ]
    print_table("held-out accuracy", ("", "before", "after"), rows)


def _print_contents(folder: Path, stream: TextIO) -> None:
    """Says where everything is that a run has left, however it ended."""
    from fipo_megatron.observability.trackers import WANDB_URL

    shown = _short(folder)
    print(f"run folder: {shown}", file=stream)
    for name, entry in CONTENTS:
        if (folder / entry).exists():
            print(f"{name}: {shown / entry}", file=stream)
    metrics = folder / "metrics.jsonl"
    num_lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if num_lines:
        print(f"metrics: {shown / metrics.name}, to step {num_lines - 1}", file=stream)
    if not (folder / "hf").exists():
        print("policy: none, a run that completes writes hf/", file=stream)
    if (folder / "samples").is_dir():
        print(f"samples: {_command('view_samples.py', str(shown))}", file=stream)
    if (folder / "tensorboard").is_dir():
        command = [str(_short(Path(sys.executable))), "-m", "tensorboard.main", "--logdir", str(shown.parent)]
        print(f"tensorboard: {shlex.join(command)}", file=stream)
    if (folder / WANDB_URL).exists():
        print(f"wandb: {(folder / WANDB_URL).read_text(encoding='utf-8').strip()}", file=stream)
    for offline in sorted(folder.glob("wandb/offline-run-*")):
        print(f"wandb, not sent yet: wandb sync {shlex.quote(str(_short(offline)))}", file=stream)
    if num_lines:
        print(f"compare: {_command('compare_runs.py', str(shown))} OTHER_RUN ...", file=stream)


def _command(tool: str, *arguments: str) -> str:
    """A command line for another tool, as it can be pasted here."""
    return shlex.join([str(_short(Path(sys.executable))), str(_short(Path(__file__).with_name(tool))), *arguments])


def _short(path: Path) -> Path:
    """The path from the working directory, where it leads below."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute


if __name__ == "__main__":
    sys.exit(main())
