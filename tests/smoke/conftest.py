"""Runs that several files look at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.smoke.train_process import ODD_REWARD, REPO, SMALL, UNTRAINED, readme_words


@pytest.fixture(scope="session")
def readme_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of the README's training runs, made by its commands but small, and what these print."""
    root = tmp_path_factory.mktemp("readme")
    small = [*SMALL, UNTRAINED, *ODD_REWARD, f"run.root={root}", f"warm_start.cache_dir={root / 'cache'}"]
    outputs = []
    for words in readme_words():
        if words[1] == "tools/train.py":
            assert words[0] == ".venv/bin/python"
            # A resumed run has its settings, which may not change, but for the number of its steps.
            arguments = [str(root / "dapo") if word == "runs/dapo" else word for word in words[1:]]
            command = [sys.executable, *arguments, *(["trainer.steps=3"] if "--resume" in words else small)]
            finished = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200, check=False)
            assert finished.returncode == 0, finished.stdout + finished.stderr
            outputs.append(finished.stdout)
    return root, outputs
