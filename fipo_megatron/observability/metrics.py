"""The numbers of a run as lines of JSON, one line a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

PREFIXES = ("rollout/", "train/", "eval/", "time/", "cost/", "sync/")


class MetricsWriter:
    """Appends one line for every `write` to a file, flushed at once, so that a killed run keeps what it had."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step, keys sorted; a wrong key or a number that is not finite is a ValueError."""
        for key, value in metrics.items():
            if not key.startswith(PREFIXES):
                raise ValueError(f"metric {key}: {value} has no known prefix; begin its name with one of {PREFIXES}")
            if not math.isfinite(value):
                raise ValueError(f"metric {key}: {value} at step {step} is not finite; find out what produced it")
        line = {"step": step, **{key: _plain(metrics[key]) for key in sorted(metrics)}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Brings what was written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in order, each with `step`; a broken line is a ValueError that names it."""
    return _parse(path, path.read_text(encoding="utf-8").splitlines())


def _parse(path: Path, lines: Sequence[str]) -> list[dict[str, Any]]:
    parsed = []
    for number, text in enumerate(lines, start=1):
        try:
            parsed.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: {text[:80]!r} is not JSON ({error}); remove the line") from error
    return parsed


def keep_metrics_to(path: Path, step: int, rest: Path) -> None:
    """Leave of a metrics file, if there is one, the lines to `step`; later ones go to the file `rest`, if there are
    any, and a line that a killed run has begun goes.

    The new file is whole on the disk before it takes the old one's place.

    Raises:
        ValueError: another line is broken; names it.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]
    steps = [line["step"] for line in _parse(path, lines)]
    later = [line for line, of_line in zip(lines, steps, strict=True) if of_line > step]
    if later:
        rest.parent.mkdir(parents=True, exist_ok=True)
        rest.write_text("".join(f"{line}\n" for line in later), encoding="utf-8")
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line, of_line in zip(lines, steps, strict=True) if of_line <= step)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def last_recorded_step(path: Path) -> int:
    """The step of the last whole line of a metrics file; -1 if there is none.

    Raises:
        ValueError: a line is broken that is not the last; names it.
    """
    if not path.exists():
        return -1
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return max((line["step"] for line in _parse(path, lines)), default=-1)


def throughput(metrics: Mapping[str, float]) -> dict[str, float]:
    """Response tokens generated and trained on per second of a step without its evaluation; what it has of the two."""
    seconds = metrics["time/step_s"] - metrics.get("time/eval_s", 0.0)
    return {
        f"time/tokens_per_second_{name}": metrics[f"rollout/{name}_tokens"] / seconds
        for name in ("generated", "trained")
        if f"rollout/{name}_tokens" in metrics
    }


def _plain(value: float) -> int | float:
    """NumPy scalars as Python's; counts stay whole numbers."""
    return value.item() if isinstance(value, np.generic) else value
