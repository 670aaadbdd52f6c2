"""Scripts of this repository in processes that begin with their imports done, which are half of a small run.

They are forked from the server that tests fork ranks from. Commands from nothing are in smoke/test_readme.py.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fipo_megatron.trainer.policy_processes import CONTEXT, PRELOADED

REPO = Path(__file__).parents[1]

# The server starts at the first fork, when all tests are collected and this is set.
CONTEXT.set_forkserver_preload([*PRELOADED, "tests.script_imports"])


def start_script(script: Path, arguments: Sequence[str], log: Path) -> Any:
    """The started process of `python script arguments`, whose output goes to `log`."""
    log.touch()
    process = CONTEXT.Process(target=_run_script, args=(script, list(arguments), log, dict(os.environ)))
    process.start()
    return process


def run_script(script: Path, arguments: Sequence[str], log: Path, timeout_s: float) -> str:
    """The output of a script that ends well."""
    return finish_script(start_script(script, arguments, log), log, timeout_s)


def finish_script(process: Any, log: Path, timeout_s: float) -> str:
    """The output of a started script, which ends well."""
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def _run_script(script: Path, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    os.setsid()  # a group of its own, so that its interrupt is not ours
    os.chdir(REPO)
    os.environ.clear()
    os.environ.update(environment)
    # As a terminal's shell leaves them, also where the tests were started with nohup or in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with log.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
