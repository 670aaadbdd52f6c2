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
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TextIO

EXAMPLES = """\
examples:
  tools/train.py configs/quickstart_cpu.yaml
  tools/train.py configs/quickstart_cpu.yaml seed=1 trainer.steps=5
  tools/train.py configs/quickstart_cpu.yaml algorithm=dapo run.name=dapo
  tools/train.py configs/quickstart_cpu.yaml parallel='{tensor: 1, data: 2}'

The run folder (runs/<config>-seed<seed>/) gets config.yaml, metrics.jsonl, curves.png, samples/ and hf/, a Hugging Face
folder of the trained policy. A failed run also leaves error.log, and the cause is the last line printed. However a run
ends, it says what is where, how to look at its samples and how to compare it.

exit status: 0 trained, 1 a failure in the run, 2 refused before a process started, 130 interrupted
"""

CONTENTS = (
    ("config", "config.yaml"),
    ("curves", "curves.png"),
    ("policy", "hf"),
    ("held-out problems, one by one", "evaluation"),
    ("traceback", "error.log"),
    ("logs of the workers", "worker_logs"),
)


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file, e.g. configs/quickstart_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    options = parser.parse_args(arguments)
    # Those that are ignored stay so: with nohup a run outlives its terminal.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    interrupts = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    for number in interrupts:
        signal.signal(number, _interrupt)
    folder: Path | None = None
    try:
        from fipo_megatron.config.load import load_config

        config = load_config(options.config, options.overrides)
        from fipo_megatron.observability.progress import Progress
        from fipo_megatron.trainer.launch import check_before_start, plan_training, run_training
        from fipo_megatron.trainer.run import make_run_folder

        files = check_before_start(config)
        with Progress() as progress, tempfile.TemporaryDirectory(prefix="fipo-") as scratch:
            plan = plan_training(config, files, Path(scratch), progress)
            del files  # gigabytes, where they are large
            folder = make_run_folder(config, options.config.stem)  # the last that may refuse the run
            progress.note(f"run folder: {folder}")
            asyncio.run(_run_interruptibly(run_training(plan, folder, progress), interrupts))
        _print_accuracies(folder)
        _print_contents(folder, sys.stdout)
        return 0
    except KeyboardInterrupt:
        status, ending = 130, "interrupted; all worker processes have ended"
    except Exception as error:
        is_refusal = isinstance(error, ValueError) and folder is None
        cause = str(error) if is_refusal else f"{type(error).__name__}: {error}"
        status, ending = 2 if is_refusal else 1, " ".join(["error:", cause, *getattr(error, "__notes__", [])])
        if folder is None and not is_refusal:
            traceback.print_exc()
        elif folder is not None:
            with contextlib.suppress(OSError):  # a full disk must not hide the cause
                (folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
    for number in interrupts:  # the ending is told to the end
        signal.signal(number, signal.SIG_IGN)
    if folder is not None:
        _print_contents(folder, sys.stderr)
    print(ending, file=sys.stderr)
    return status


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


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


async def _run_interruptibly(training: Coroutine[Any, Any, None], interrupts: Sequence[int]) -> None:
    """Signals cancel the task: an exception out of a handler could end in a library's callback, and be lost there."""
    loop, task, received = asyncio.get_running_loop(), asyncio.current_task(), []
    assert task is not None

    def cancel(number: int) -> None:
        received.append(number)
        task.cancel()
        for other in interrupts:  # a second one no longer waits for its turn
            loop.remove_signal_handler(other)
            signal.signal(other, _interrupt)

    for number in interrupts:
        loop.add_signal_handler(number, cancel, number)
    try:
        await training
    except asyncio.CancelledError as error:
        if received:
            raise KeyboardInterrupt from error
        raise RuntimeError("the run was cancelled from within, and no signal came") from error


if __name__ == "__main__":
    sys.exit(main())
