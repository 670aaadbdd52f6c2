"""A hook of mkdocs, for what GitHub reads otherwise.

A link from a page to a file outside docs/ becomes that file's path, as the site has no such page. The mark of commands
that need more than a CPU (```sh gpu, ```sh cluster) becomes the block's title.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")

MARKED_FENCE = re.compile(r"^(\s*```)(?:sh|bash) (gpu|cluster)$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **arguments: Any) -> str:
    """The page's text, for example `[the loop](../trainer/loop.py)` as "the loop (`trainer/loop.py`)"."""

    def name_file(match: re.Match[str]) -> str:
        folder = posixpath.dirname(f"docs/{page.file.src_uri}")
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        return match[0] if path.startswith("docs/") else describe(match[1], path)

    return MARKED_FENCE.sub(r'\1sh title="needs a \2"', LINK.sub(name_file, markdown))


def describe(text: str, path: str) -> str:
    """Text and path, the path once."""
    return f"`{path}`" if text.strip("`") in (path, posixpath.basename(path)) else f"{text} (`{path}`)"
