from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.trainer import layout_check
from fipo_megatron.trainer.layout_check import LayoutErrors
from tools import check_layouts

EQUAL = LayoutErrors(1e-6, 1e-7, 1e-6, "head", 1e-5, 0.5)


@pytest.mark.parametrize("field", ["abs_err_logprob", "abs_err_loss", "rel_err_grad", "rel_err_parameters"])
@pytest.mark.parametrize("error", [float("nan"), float("inf"), 1e-2])
def test_one_error_is_enough(field: str, error: float) -> None:
    assert EQUAL.ok
    assert not replace(EQUAL, **{field: error}).ok


class CheckerThatFindsNothing:
    """Of layouts: only pp2 fails, in a rank."""

    def __init__(self, family: str, folder: Path, max_response_tokens: int | None, platform: str) -> None:
        self.family = family

    def check(self, layout: str, **_: Any) -> LayoutErrors:
        if layout == "pp2":
            raise RuntimeError("rank 0: lost")
        return EQUAL


def test_a_failed_layout_has_a_row_and_one_left_out_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layout_check, "Checker", CheckerThatFindsNothing)
    assert check_layouts.main(["--family", "qwen2", "--layouts", "tp2", "ep2", "pp2", "--json"]) == 1
    output, errors = capsys.readouterr()
    rows = [json.loads(line) for line in output.splitlines()]
    assert [(row["layout"], row["ok"], row["rel_err_grad"]) for row in rows] == [
        ("tp2", True, 1e-6),
        ("pp2", False, None),
    ]
    assert "ep2 is no layout of qwen2: left out" in errors
    assert "qwen2 pp2: rank 0: lost" in errors
    assert check_layouts.main(["--family", "qwen2", "--layouts", "tp2"]) == 0
    assert "yes" in capsys.readouterr().out


def test_nothing_to_check_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_layouts.main(["--family", "qwen2", "--layouts", "ep2"]) == 2
    assert "none of them is one of --family" in capsys.readouterr().err
    for length in ("0", "-5", "many"):
        with pytest.raises(SystemExit, match="2"):
            check_layouts.main(["--max-response-tokens", length])
