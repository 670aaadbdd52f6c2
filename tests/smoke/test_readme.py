"""Every command of the README does what it says. `make` itself is what CI runs; the others run here, small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.script_process import REPO, run_script
from tests.smoke.train_process import readme_words

MAKE = (["make", "quickstart"], ["make", "test"])
QUICK_BENCH = ["--shape", "4", "1000", "--samples", "3"]


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    assert all(words in readme_words() for words in MAKE)
    targets = re.findall(r"^(\w+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert {"install", "quickstart", "test", "lint"} <= set(targets)


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (REPO / "README.md").read_text())
    assert len(links) > 5
    missing = [link for link in links if not link.startswith("https://") and not leads_somewhere(link)]
    assert not missing


def leads_somewhere(link: str) -> bool:
    """Whether the repository has the file, and the file the heading that stands behind `#`."""
    name, _, anchor = link.partition("#")
    if not anchor:
        return (REPO / name).exists()
    headings = re.findall(r"^#+ (.+)$", (REPO / name).read_text(), re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.multiproc
def test_the_tools_run_as_written(readme_runs: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Training from nothing, as it is started by hand; the others in processes with their imports done."""
    root, trained = readme_runs
    for output in trained:
        assert "held-out accuracy" in output
        assert "policy: " in output
    assert {path.name for path in root.iterdir()} == {"cache", "quickstart_cpu-seed1", "dapo"}
    moved = {"runs/quickstart_cpu-seed0": str(root / "quickstart_cpu-seed1"), "runs/dapo": str(root / "dapo")}
    commands = [words for words in readme_words() if words not in MAKE and words[1] != "tools/train.py"]
    assert len(commands) >= 5
    for python, tool, *arguments in commands:
        assert python == ".venv/bin/python"
        arguments = [moved.get(argument, argument) for argument in arguments]
        more = {"tools/compare_runs.py": ["--out", str(tmp_path / "compare.png")], "tools/bench.py": QUICK_BENCH}
        arguments += more.get(tool, [])
        assert run_script(REPO / tool, arguments, tmp_path / "output.log", timeout_s=200)
