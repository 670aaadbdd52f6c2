"""Messages that docs/troubleshooting.md quotes are those of the code; `...` stands for what differs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
HOLE = "\0"  # a value in a message


def texts_in(source: str) -> Iterator[str]:
    """Every text of a module, joined as Python joins it, a hole for each value."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)


def quoted_messages() -> list[str]:
    """The first cells of the tables whose head is `message`."""
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE)
    return [re.match(r"\| `([^`]+)` \|", row)[1] for table in tables for row in table.splitlines()]  # type: ignore[index]


def find(message: str, texts: list[str]) -> bool:
    """Whether the pieces between the dots stand in one text, in their order."""
    pieces = [re.escape(piece) for piece in message.split("...")]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    return any(pattern.search(text) for text in texts)


TEXTS = [
    text
    for folder in ("fipo_megatron", "tools")
    for path in (ROOT / folder).rglob("*.py")
    for text in texts_in(path.read_text())
]


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_the_codes(message: str) -> None:
    assert sum(len(piece) for piece in message.split("...")) > 10, "quote more of it"
    assert find(message, TEXTS)


def test_the_page_quotes_many() -> None:
    assert len(quoted_messages()) > 35


def test_what_the_code_does_not_say_is_not_found() -> None:
    texts = list(texts_in('raise ValueError(f"a.b = {x}: is {y}; " "set it")'))
    assert find("a.b = ...: is ...; set it", texts)
    assert not find("a.b = ...: was ...; set it", texts)
    assert not find("set it...a.b", texts)


def test_the_figures_of_long_context_are_the_planners() -> None:
    from fipo_megatron.config.load import load_config
    from fipo_megatron.parallel.plan import microbatch_tokens

    page = (ROOT / "docs/long_context.md").read_text()
    recipe = ROOT / "configs/recipes/fipo_32b.yaml"
    for overrides in ([], ["parallel={context: 4}"], ["parallel={context: 4, tensor: 4, sequence_parallel: true}"]):
        assert f"{microbatch_tokens(load_config(recipe, overrides)):,}" in page
    assert f"{22528 * 152064 * 4 / 2**30:.1f} GiB in float32" in page
