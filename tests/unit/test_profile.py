"""The profiling tool's options, and that its name does no harm: `profile` is a module of the standard library, too."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.script_process import REPO
from tools import profile

CONFIG = str(REPO / "configs" / "quickstart_cpu.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml"),
        ([CONFIG, "--steps", "0"], "--steps 0: must be at least 1"),
        ([CONFIG, "--pairs", "-1"], "--pairs -1: must be at least 0"),
        (
            [CONFIG, "--memory-snapshot"],
            "--memory-snapshot with platform = 'cpu': of CUDA alone; leave it out, --trace",
        ),
        ([CONFIG, "--nsys"], "--nsys with platform = 'cpu': of CUDA alone"),
        ([CONFIG, "--out", "taken"], "run.name: taken exists"),
        ([CONFIG, "trainer.step=3"], "trainer.step"),
        ([CONFIG, "trainer.steps=3"], "trainer.steps: a profile makes 1 to warm up"),
    ],
)
def test_what_is_refused_is_one_line_and_starts_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own_signals: None,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    assert profile.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert not Path("runs").exists()


def test_who_imports_the_standard_librarys_profile_gets_it() -> None:
    """As in every script in tools/, and in the workers of its run, to whose path Ray adds the script's folder."""
    code = f"""
import sys
sys.path.insert(0, {str(REPO / "tools")!r})
import cProfile, profile, torch._dynamo
print(profile.__file__, profile.Profile.__module__, cProfile._pyprofile is profile)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert finished.stdout.split() == [f"{sysconfig.get_path('stdlib')}/profile.py", "profile", "True"]
