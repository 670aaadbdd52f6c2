"""Train a policy with FIPO (or DAPO, GRPO): one config is one run."""

from __future__ import annotations

import argparse
import asyncio
import math
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

EXAMPLES = """\
examples:
  tools/train.py configs/quickstart_cpu.yaml
  tools/train.py configs/quickstart_cpu.yaml seed=1 trainer.steps=5
  tools/train.py configs/quickstart_cpu.yaml algorithm.objective=dapo run.name=dapo
  tools/train.py configs/quickstart_cpu.yaml parallel='{tensor: 1, data: 2}'

The run folder (runs/<config>-seed<seed>/) gets config.yaml, metrics.jsonl, curves.png, samples/ and hf/, a Hugging Face
folder of the trained policy. A failed run also leaves error.log, and the cause is the last line printed. A finished one
says how to look at its samples and how to compare it.
"""


IMPATIENCE_S = 5.0  # a second Ctrl-C so soon must not cut off the ending that the first one began
interrupted_at = -math.inf


def main() -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file, e.g. configs/quickstart_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it: the run outlives its terminal
            signal.signal(number, _interrupt)
    folder: Path | None = None
    try:
        from fipo_megatron.config.load import load_config

        config = load_config(arguments.config, arguments.overrides)
        from fipo_megatron.observability.progress import Progress
        from fipo_megatron.trainer.launch import check_before_start, run_training
        from fipo_megatron.trainer.run import make_run_folder

        check_before_start(config)
        folder = make_run_folder(config, arguments.config.stem)
        with Progress() as progress:
            progress.note(f"run folder: {folder}")
            asyncio.run(run_training(config, folder, progress))
        _print_summary(folder)
    except KeyboardInterrupt:
        print("interrupted; all worker processes have ended", file=sys.stderr)
        return 130
    except ValueError as error:
        _log(folder)
        print(f"error: {error}", *getattr(error, "__notes__", []), file=sys.stderr)
        return 2
    except Exception as error:
        _log(folder)
        print(f"error: {type(error).__name__}: {error}", *getattr(error, "__notes__", []), file=sys.stderr)
        return 1
    return 0


def _print_summary(folder: Path) -> None:
    from fipo_megatron.observability.metrics import read_metrics
    from fipo_megatron.observability.progress import print_table

    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "eval/sampled_accuracy" in line]
    rows = [
        (name, f"{lines[0][f'eval/{name}_accuracy']:.3f}", f"{lines[-1][f'eval/{name}_accuracy']:.3f}")
        for name in ("sampled", "greedy")
        if f"eval/{name}_accuracy" in lines[0]
    ]
    print_table("held-out accuracy", ("", "before", "after"), rows)
    shown = _short(folder)
    print(f"curves: {shown / 'curves.png'}\nmetrics: {shown / 'metrics.jsonl'}\npolicy: {shown / 'hf'}")
    print(f"config: {shown / 'config.yaml'}\nheld-out problems, one by one: {shown / 'evaluation'}")
    if (folder / "samples").is_dir():
        print(f"samples: {_command('view_samples.py', str(shown))}")
    if (folder / "tensorboard").is_dir():
        command = [str(_short(Path(sys.executable))), "-m", "tensorboard.main", "--logdir", str(shown.parent)]
        print(f"tensorboard: {shlex.join(command)}")
    print(f"compare: {_command('compare_runs.py', str(shown))} OTHER_RUN ...")


def _command(tool: str, *arguments: str) -> str:
    """A command line for another tool, as it can be pasted here."""
    return shlex.join([str(_short(Path(sys.executable))), str(_short(Path(__file__).with_name(tool))), *arguments])


def _short(path: Path) -> Path:
    """The path from the working directory, where it leads below."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute


def _interrupt(signum: int, frame: object) -> None:
    global interrupted_at
    since, interrupted_at = time.monotonic() - interrupted_at, time.monotonic()
    if since > IMPATIENCE_S:
        raise KeyboardInterrupt


def _log(folder: Path | None) -> None:
    if folder is None:
        return
    (folder / "error.log").write_text(traceback.format_exc())
    print(f"traceback: {folder / 'error.log'}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
