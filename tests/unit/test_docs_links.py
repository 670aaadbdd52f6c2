"""Links, anchors and pictures of README, docs/ and examples/ lead somewhere; the navigation has every page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fipo_megatron.config.reference import anchor

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *sorted((ROOT / "examples").glob("*/README.md"))]


def without_code(text: str) -> str:
    """A page without its blocks and spans of code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)


def headings(page: Path) -> list[str]:
    """The fragments of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]


def find_broken(page: Path) -> Iterator[str]:
    """Links of a page whose file or heading is not there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        if link.startswith("https://"):
            continue
        if not target.exists() or (fragment and fragment not in headings(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert list(find_broken(page)) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b_c`, d\n[1](#a-b_c-d) [2](#none) [3](page.md#none) [4](none.md) `[5](none.md)` [6](page.md)\n"
    )
    assert list(find_broken(page)) == ["#none", "page.md#none", "none.md"]


def test_headings_of_a_page_are_unique() -> None:
    """The second of two equal ones gets another fragment, by rules that differ between GitHub and the site."""
    twice = {page: sorted({name for name in headings(page) if headings(page).count(name) > 1}) for page in PAGES}
    assert {name: found for name, found in twice.items() if found} == {}


def test_the_navigation_has_every_page_once() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [name for part in navigation for entries in part.values() for entry in entries for name in entry.values()]
    assert sorted(pages) == [page.name for page in DOCS]


def test_the_api_reference_names_modules() -> None:
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert len(names) > 15
    paths = [ROOT / name.replace(".", "/") for name in names]
    assert [path for path in paths if not (path.with_suffix(".py").exists() or (path / "__init__.py").exists())] == []


def test_the_site_fetches_nothing() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False
    assert settings["strict"] is True
    assert not {"extra_javascript", "extra_css"} & set(settings)
    for picture in (ROOT / "docs/images").glob("*.svg"):
        drawing = picture.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http" not in drawing
        assert "<script" not in drawing
