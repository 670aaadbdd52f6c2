"""Every command of the README does what it says. `make` itself is what CI runs; the others run here, small."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.smoke.train_process import ODD_REWARD, REPO, SMALL, UNTRAINED

MAKE = {"make quickstart", "make test"}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def run(command: str, *more: str) -> str:
    words = shlex.split(command)
    assert words[0] == ".venv/bin/python"
    finished = subprocess.run(
        [sys.executable, *words[1:], *more], cwd=REPO, capture_output=True, text=True, timeout=200, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    assert set(readme_commands()) >= MAKE
    targets = re.findall(r"^(\w+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert {"install", "quickstart", "test", "lint"} <= set(targets)


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (REPO / "README.md").read_text())
    assert len(links) > 5
    missing = [link for link in links if not link.startswith("https://") and not (REPO / link).exists()]
    assert not missing


@pytest.mark.multiproc
def test_the_tools_run_as_written(tmp_path: Path) -> None:
    commands = [command for command in readme_commands() if command not in MAKE]
    small = [
        *SMALL,
        UNTRAINED,
        *ODD_REWARD,
        f"run.root={tmp_path}",
        f"warm_start.cache_dir={tmp_path / 'cache'}",
        "rollout.engine=hf",
    ]
    trained = [command for command in commands if "tools/train.py" in command]
    for command in trained:
        output = run(command, *small)
        assert "held-out accuracy" in output
        assert "policy: " in output
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "quickstart_cpu-seed1", "dapo"}
    for command in set(commands) - set(trained):
        command = command.replace("runs/quickstart_cpu-seed0", str(tmp_path / "quickstart_cpu-seed1"))
        more = ["--out", str(tmp_path / "compare.png")] if "compare_runs" in command else []
        assert run(command.replace("runs/dapo", str(tmp_path / "dapo")), *more)
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("tool", sorted(path.name for path in (REPO / "tools").glob("*.py")))
def test_help_is_quick_and_has_examples(tool: str) -> None:
    finished = subprocess.run(
        [sys.executable, f"tools/{tool}", "--help"], cwd=REPO, capture_output=True, text=True, timeout=5, check=True
    )
    assert tool in finished.stdout
    if tool != "install.py":
        assert "example" in finished.stdout
