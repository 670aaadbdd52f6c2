"""What a replay compares; that it makes a run's updates again is shown on whole runs, in tests/smoke/test_train.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.trainer.replay import compare_metrics, load_recorded_run

LOSS = {"train/loss": 0.5, "train/ratio_max": 20.0, "train/clip_frac": 0.25}
RECORDED = {"step": 1, "rollout/trained_tokens": 1000, **LOSS}


@pytest.mark.parametrize(
    ("change", "worst", "difference", "moved_tokens", "ok"),
    [
        ({}, None, 0.0, 0.0, True),
        ({"train/loss": 0.50009}, "train/loss", 9e-5, 0.0, True),
        ({"train/loss": 0.50011}, "train/loss", 1.1e-4, 0.0, False),
        ({"train/ratio_max": 20.0018}, "train/ratio_max", 9e-5, 0.0, True),  # relative
        ({"train/ratio_max": 20.0022}, "train/ratio_max", 1.1e-4, 0.0, False),
        ({"train/clip_frac": 0.2579}, None, 0.0, 7.9, True),  # in tokens
        ({"train/clip_frac": 0.2581}, None, 0.0, 8.1, False),
        ({"train/loss": math.nan}, "train/loss", math.inf, 0.0, False),
        ({"train/new": 1.0}, "train/new", math.inf, 0.0, False),
    ],
)
def test_differences(
    change: dict[str, float], worst: str | None, difference: float, moved_tokens: float, ok: bool
) -> None:
    errors = compare_metrics([LOSS | change], [RECORDED | {"train/batch_kl": 0.1}])
    assert worst is None or errors.worst == worst
    assert errors.values[errors.worst] == pytest.approx(difference)
    assert (errors.moved_tokens, errors.ok) == (pytest.approx(moved_tokens), ok)


def test_a_metric_that_the_replay_lacks_is_a_difference() -> None:
    found: list[dict[str, Any]] = [{"train/loss": 0.5, "train/clip_frac": 0.25}]
    errors = compare_metrics(found, [RECORDED])
    assert (errors.worst, errors.ok) == ("train/ratio_max", False)


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run folder \(config.yaml\)"):
        load_recorded_run(tmp_path, 1)
