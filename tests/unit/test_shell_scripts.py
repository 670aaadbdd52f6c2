"""The scripts of examples/: shellcheck, and what they say where they can't run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BATCH = sorted((ROOT / "examples").glob("*/*.sbatch"))
RUN = sorted((ROOT / "examples").glob("*/run.sh"))


def run(script: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", script],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_shellcheck_has_no_complaint() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: make install")
    scripts = [*BATCH, *RUN, ROOT / "examples/slurm/fipo_slurm.sh"]
    checked = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_every_recipe_has_both_scripts_and_names_them() -> None:
    recipes = sorted(path.parent for path in (ROOT / "examples").glob("*/config.yaml"))
    assert len(recipes) == 5
    for recipe in recipes:
        readme = (recipe / "README.md").read_text()
        assert f"\nSBATCH_ACCOUNT=account sbatch examples/{recipe.name}/slurm.sbatch\n" in readme
        assert f"\nexamples/{recipe.name}/run.sh" in readme
        assert {recipe / "run.sh", recipe / "slurm.sbatch"} <= {*RUN, *BATCH}


@pytest.mark.parametrize("script", BATCH, ids=lambda script: f"{script.parent.name}/{script.name}")
def test_a_batch_script_is_for_the_checkout(script: Path, tmp_path: Path) -> None:
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (1, f"{tmp_path} is not the checkout; call sbatch there\n")


@pytest.mark.parametrize("script", BATCH[:1], ids=lambda script: script.name)
def test_a_batch_script_names_a_missing_interpreter(script: Path) -> None:
    done = run(script, ROOT, PYTHON="no/python")
    assert done.returncode == 1
    assert done.stderr == "fipo_slurm: PYTHON=no/python: no such interpreter; run make install\n"


@pytest.mark.parametrize(
    "script", [script for script in RUN if "PYTHON" in script.read_text()], ids=lambda script: script.parent.name
)
def test_a_run_script_names_a_missing_interpreter(script: Path, tmp_path: Path) -> None:
    done = run(script, tmp_path, PYTHON="no/python")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "run.sh: PYTHON = no/python: no such interpreter; run make install\n"
