"""A page that needs nothing but itself, from a folder with page.html, page.css and page.js and from data."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources.abc import Traversable

# Nothing is loaded and nothing is sent; of scripts and styles only those in the page, told by their hashes, are used.
POLICY = "default-src 'none'; script-src '{script}'; style-src '{style}'; base-uri 'none'; form-action 'none'"


def fill_page(assets: Traversable, title: str, data: object) -> str:
    """The page, ASCII but for its own script.

    The data stand in a JSON block without a character that HTML reads; the script inserts them as text.
    """
    script, style = ((assets / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    parts = {
        "POLICY": html.escape(POLICY.format(script=_hash(script), style=_hash(style)), quote=False),
        "TITLE": html.escape(title),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": json_for_html(data),
    }
    return re.sub("@@([A-Z]+)@@", lambda match: parts[match[1]], (assets / "page.html").read_text(encoding="utf-8"))


def json_for_html(data: object) -> str:
    """ASCII JSON without `<`, `>` and `&`: no text in it can end its block or begin another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
