"""tools/docs_site: what its hook makes of a page, and that the pictures are those that the script draws."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/docs_site/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[the loop](../fipo_megatron/trainer/loop.py)", "the loop (`fipo_megatron/trainer/loop.py`)"),
        ("[loop.py](../fipo_megatron/trainer/loop.py)", "`fipo_megatron/trainer/loop.py`"),
        ("[`loop.py`](../a/loop.py#L3)", "`a/loop.py`"),
        ("[recipes](recipes.md#x)", "[recipes](recipes.md#x)"),
        ("[site](https://a.org)", "[site](https://a.org)"),
        ("![picture](../docs/images/step.svg)", "![picture](../docs/images/step.svg)"),
        ("```sh gpu\npip install x\n```", '```sh title="needs a gpu"\npip install x\n```'),
        ("```bash\nmake test\n```", "```bash\nmake test\n```"),
    ],
)
def test_the_hook(written: str, shown: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    assert load("repository_links").on_page_markdown(written, page, config=None, files=None) == shown


def test_the_pictures_are_those_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("draw_pictures")
    monkeypatch.setattr(module, "IMAGES", tmp_path)
    for name in ("step", "layouts", "context", "scan", "sync"):
        getattr(module, f"draw_{name}")()
        drawn = (tmp_path / f"{name}.svg").read_text()
        assert drawn == (ROOT / f"docs/images/{name}.svg").read_text(), "run tools/docs_site/draw_pictures.py"
        picture = ElementTree.fromstring(drawn)
        assert picture.find(f"{SVG}title") is not None
        width, height = (float(picture.attrib[key]) for key in ("width", "height"))
        for box in picture.iter(f"{SVG}rect"):
            assert float(box.get("x", 0)) + float(box.attrib["width"]) <= width
            assert float(box.get("y", 0)) + float(box.attrib["height"]) <= height


def test_the_scan_that_is_drawn_is_the_algorithms() -> None:
    import torch

    from fipo_megatron.algorithm.future_kl import influence_weights
    from fipo_megatron.config.schema import AlgorithmConfig

    changes = torch.tensor([0.02, -0.01, 0.30, 0.05, 0.0, 0.08], dtype=torch.float64)
    config = AlgorithmConfig(preset="fipo_32b")
    gamma = 2 ** (-1 / config.half_life_tokens)
    sums = torch.tensor([sum(gamma ** (k - t) * changes[k] for k in range(t, 6)) for t in range(6)])
    weights = influence_weights(sums, changes.exp(), torch.ones(6, dtype=torch.float64), config)
    drawn = (ROOT / "docs/images/scan.svg").read_text()
    for value in sums:
        assert f">{value:+.2f}<" in drawn
    for weight in weights:
        assert f">{weight:.2f}<" in drawn
