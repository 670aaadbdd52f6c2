"""The health check of a container: the packages import, a training can start, and with `--gpu` a GPU is there.

Prints what it found, which `docker inspect` shows. Exit status 0 or, with the cause, 1. No context is made on a GPU:
a run may have filled its memory.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("fipo_megatron", "ray", "torch")
TIMEOUT_S = 90
EXAMPLES = """\
examples:
  tools/check_health.py
  tools/check_health.py --gpu
"""


def find_problem(gpu: bool, modules: Sequence[str]) -> str | None:
    """What is wrong, in one line, or None."""
    found = {}
    for name in modules:
        try:
            found[name] = importlib.import_module(name)
        except Exception as error:  # libraries raise what they like when a part of theirs is missing
            return f"import {name}: {type(error).__name__}: {error}"
    print(", ".join(f"{name} {getattr(module, '__version__', '')}" for name, module in found.items()), flush=True)
    if gpu:
        import torch

        count = torch.cuda.device_count()
        print(f"{count} GPUs", flush=True)
        if count == 0:
            return "no GPU: start the container with --gpus all, and see nvidia-smi on the machine"
    train = (sys.executable, str(ROOT / "tools/train.py"), "--help")
    try:
        helped = subprocess.run(train, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"tools/train.py --help takes more than {TIMEOUT_S} s: the machine is overloaded, or its disk hangs"
    return helped.stderr.strip() or "tools/train.py --help failed" if helped.returncode != 0 else None


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when the container is healthy."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="ask for a GPU, too")
    problem = find_problem(parser.parse_args(arguments).gpu, MODULES)
    print(f"check_health: {problem}" if problem else "healthy")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
