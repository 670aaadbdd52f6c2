"""Every command of the documentation is run by a test, or its tool takes its arguments, or it is marked.

A block of commands begins with ```sh or ```bash; ```sh gpu and ```sh cluster mark what can't run here. A word in
capitals stands for something of the reader's.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.config.load import load_config
from tests.script_process import REPO
from tests.smoke.train_process import readme_words

PAGES = [*sorted((REPO / "docs").glob("*.md")), *sorted((REPO / "examples").glob("*/README.md"))]
MARKS = ("gpu", "cluster")
QUICKSTART = "configs/quickstart_cpu.yaml"
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]+(/[\w.-]*)?")
MKDOCS = REPO / ".venv/docs/bin/mkdocs"


@dataclass(frozen=True)
class Command:
    page: str
    words: tuple[str, ...]
    mark: str | None = None

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


class Parsed(Exception):
    """Instead of what a tool does after it has parsed its arguments."""


def read_commands(page: str, text: str) -> Iterator[Command]:
    """The commands of a page's blocks, and those in a line of text that begin with `tools/` or `make`."""
    for kind, block in re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        language, _, mark = kind.partition(" ")
        if language not in ("sh", "bash"):
            assert not re.search(r"^(\.venv/bin/python|make|pip) ", block, re.MULTILINE), (
                f"{page}: commands in ```{kind}"
            )
            continue
        assert mark in ("", *MARKS), f"{page}: ```{kind} is marked by none of {MARKS}"
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield Command(page, tuple(words), mark or None)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"(?<!`)`((?:\.venv/bin/python )?tools/\w+\.py\s[^`]+|make [^`]+)`(?!`)", prose):
        yield Command(page, tuple(word for word in shlex.split(span)))


def page_name(page: Path) -> str:
    return page.relative_to(REPO).as_posix().removeprefix("docs/")


COMMANDS = [command for page in PAGES for command in read_commands(page_name(page), page.read_text())]
UNMARKED = [command for command in COMMANDS if command.mark is None]


def load_tool(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stop_after(parse: Callable[..., Any]) -> Callable[..., None]:
    def stop(self: argparse.ArgumentParser, *given: Any) -> None:
        raise Parsed(parse(self, *given))

    return stop


def check_tool(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the tool takes the arguments; a configuration's overrides have to load, too."""
    path, arguments = REPO / words[0], words[1:]
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))
    with pytest.raises(Parsed) as parsed:
        load_tool(path).main(arguments)
    if path.name == "train.py":
        options = parsed.value.args[0]
        given = [word for word in (options.config, *options.overrides) if word is not None]
        overrides = [word for word in given if "=" in word]
        if options.resume in (None, "auto") and not PLACEHOLDER.fullmatch(given[0]):
            load_config(REPO / given[0], overrides)
        else:
            load_config(REPO / QUICKSTART, overrides)


def check_make(words: list[str]) -> None:
    """Fail unless the targets are the Makefile's; what is handed to the quickstart has to load."""
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    named = [word for word in words[1:] if "=" not in word]
    assert set(named) <= targets, f"no such target: {named}"
    assert set(variables) <= {"ARGS", "PARITY_ARGS", "PYTHON"}
    if named == ["quickstart"]:
        load_config(REPO / QUICKSTART, shlex.split(variables.get("ARGS", "").replace("=N", "=1")))


def check_script(words: list[str]) -> None:
    """Fail unless it is a script of the repository without an error of syntax; overrides have to load beside it."""
    script = REPO / words[0]
    assert script.is_file(), words[0]
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).returncode == 0
    if (script.parent / "config.yaml").exists():
        load_config(script.parent / "config.yaml", words[1:])
    else:
        assert not words[1:], f"{words[0]} takes no settings"


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = list(command.words)
    if words in readme_words():
        return  # run by test_readme.py
    if words[0] == "make":
        return check_make(words)
    if words[0] == ".venv/bin/python":
        words = words[1:]
    if words[0] == "bash" or words[0].startswith("examples/"):
        return check_script(words[1:] if words[0] == "bash" else words)
    assert words[0].startswith("tools/"), "neither a tool, nor make, nor a script of the repository; mark its block"
    check_tool(words, monkeypatch)


@pytest.mark.parametrize("command", UNMARKED, ids=str)
def test_a_command_is_run_or_can_be(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command, monkeypatch)


def test_all_pages_have_been_read() -> None:
    assert len(UNMARKED) > 30
    assert {command.page for command in UNMARKED} >= {"quickstart.md", "data.md", "conversion.md", "weight_sync.md"}


@pytest.mark.parametrize(
    "line",
    [
        ".venv/bin/python tools/train.py configs/quickstart_cpu.yaml trainer.step=5",
        ".venv/bin/python tools/train.py configs/no_such_file.yaml",
        ".venv/bin/python tools/train.py CONFIG --no-such-option",
        ".venv/bin/python tools/no_such_tool.py",
        ".venv/bin/python tools/convert.py megatron-to-hf --model MODEL",
        "make no-such-target",
        "make quickstart ARGS=trainer.steps=many",
        "curl https://example.org",
        "bash examples/no_such_recipe/run.sh",
        "examples/no_such_recipe/run.sh",
        "examples/compare_algorithms/run.sh seed=1",
    ],
)
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, ValueError, SystemExit, FileNotFoundError)):
        check(Command("page.md", tuple(shlex.split(line))), monkeypatch)


def test_a_script_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    check(Command("page.md", ("examples/compare_algorithms/run.sh",)), monkeypatch)


def test_blocks_and_marks_are_read() -> None:
    text = "```sh gpu\npip install x \\\n  y # why\n```\nsee `tools/bench.py scan\n--others`\n```yaml\na: 1\n```\n"
    assert list(read_commands("p", text)) == [
        Command("p", ("pip", "install", "x", "y"), "gpu"),
        Command("p", ("tools/bench.py", "scan", "--others")),
    ]
    with pytest.raises(AssertionError, match="marked by none"):
        list(read_commands("p", "```sh slow\nmake test\n```\n"))
    with pytest.raises(AssertionError, match="commands in"):
        list(read_commands("p", "```\nmake test\n```\n"))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if not MKDOCS.is_file():
        pytest.skip("no .venv/docs: `make docs` builds it")
    command = [MKDOCS, "build", "--strict", "--site-dir", tmp_path / "site"]
    built = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    assert "rollout.prompts_per_step" in (tmp_path / "site/configuration.html").read_text()
    assert "influence_weights" in (tmp_path / "site/api.html").read_text()
