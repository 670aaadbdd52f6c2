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


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of one node, with a `scontrol` that takes down its calls and a `sleep` that is over."""
    for name, line in (("scontrol", f'echo "$@" >>{tmp_path}/calls'), ("sleep", "exit 0")):
        write_program(tmp_path / name, line)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "FIPO_JOBS": str(tmp_path / "jobs"),
        "PYTHON": str(tmp_path / "python"),
    }


def write_program(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


def run_job(job: dict[str, str], folder: Path, *trainer: str) -> tuple[int, str, str]:
    """Exit status, error output and the calls of scontrol of a job that trains with these lines of shell."""
    write_program(folder / "python", *trainer)
    done = run(ROOT / "examples/fipo_qwen2.5_7b_math/slurm.sbatch", ROOT, **job)
    calls = folder / "calls"
    return done.returncode, done.stderr, calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_a_run_that_has_ended_ends_the_job(job: dict[str, str], tmp_path: Path, status: int) -> None:
    assert run_job(job, tmp_path, f"exit {status}") == (status, "", "")


def test_a_run_that_was_asked_to_stop_is_queued_again(job: dict[str, str], tmp_path: Path) -> None:
    stops = ("trap 'kill $!; exit 75' USR1", "/bin/sleep 20 >/dev/null 2>&1 &", "kill -USR1 $PPID", "wait")
    assert run_job(job, tmp_path, *stops) == (0, "", "requeue 7\n")
    job["SLURM_RESTART_COUNT"] = job["FIPO_MAX_REQUEUES"] = "3"
    status, error, calls = run_job(job, tmp_path, *stops)
    assert (status, calls) == (1, "requeue 7\n")
    assert "queued again 3 times (FIPO_MAX_REQUEUES)" in error


def test_a_signal_before_the_run_has_started_does_not_go_round_for_ever(job: dict[str, str], tmp_path: Path) -> None:
    dies = ("kill -USR1 $PPID", "exec /bin/sleep 20")
    status, error, calls = run_job(job, tmp_path, *dies)
    assert (status, calls) == (1, "")
    assert error.endswith(
        "the signal came before the run had started; give more --time, or fewer seconds in --signal\n"
    )


@pytest.mark.parametrize(
    ("cpus", "cause"),
    [
        ({}, "--cpus-per-task is not set: give the processors of a node, which Ray shares out"),
        ({"SLURM_CPUS_PER_TASK": "2"}, "Ray ended on a node before all 2 were there; see {jobs}/7-0/*.log"),
    ],
)
def test_nodes_that_do_not_come_up_end_the_job(
    job: dict[str, str], tmp_path: Path, cpus: dict[str, str], cause: str
) -> None:
    """On a real Slurm: tests/cluster/test_slurm.py."""
    write_program(tmp_path / "srun", "exit 1")
    two_nodes = {**job, **cpus, "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1"}
    status, error, calls = run_job(two_nodes, tmp_path, "exec /bin/sleep 20")
    assert (status, calls) == (1, "")
    assert error.strip() == "fipo_slurm: " + cause.format(jobs=tmp_path / "jobs")
    assert not list(tmp_path.glob("jobs/*/token"))
