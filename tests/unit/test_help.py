"""`--help` of every tool: it has examples, and is there at once, since no large library is imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).parents[2] / "tools").glob("*.py"))
LARGE = ("torch", "numpy", "pydantic", "ray", "megatron", "transformers", "matplotlib", "rich")
SHOW_HELP = f"""\
import atexit, runpy, sys
atexit.register(lambda: print("imported:", [name for name in {LARGE} if name in sys.modules]))
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_help_has_examples_and_imports_nothing_large(tool: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, tool], capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "example" in shown.stdout
    assert shown.stdout.endswith("imported: []\n")


def test_all_tools_were_found() -> None:
    assert {"train", "install", "wait_for_ray"} <= {tool.stem for tool in TOOLS}
