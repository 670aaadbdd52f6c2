"""What a benchmark prints: rows, targets, and both as tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

HEADER = ("variant", "median ms", "min", "p20", "p80", "peak MiB", "max error", "x roof")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """A variant as measured; None: not measured."""

    name: str  # of the operation
    variant: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    median_ms: float | None = None
    min_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    peak_bytes: int | None = None  # beside the inputs
    max_abs_err: float | None = None  # of results and gradients, from float64; None for a roof
    ratio_to_roof: float | None = None  # of the medians

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))


Rows = Mapping[str, Row]


@dataclass(frozen=True)
class Target:
    """A figure of the rows with a limit. `figures` gives it by the medians and by the minima, None where unmeasured."""

    text: str
    limit: float
    figures: Callable[[Rows], tuple[float, float] | None]
    at_least: bool = False

    def judge(self, rows: Rows) -> tuple[str, str]:
        """The figure, with that of the minima where it differs, and "met", "not met" or "not measured"."""
        figures = self.figures(rows)
        if figures is None:
            return "", NOT_MEASURED
        figure, of_minima = figures
        met = figure >= self.limit if self.at_least else figure <= self.limit
        text = format_figure(figure)
        if figure != of_minima:
            text += f" (minima: {format_figure(of_minima)})"
        return text, "met" if met else "not met"


def time_ratio(over: str, under: str) -> Callable[[Rows], tuple[float, float] | None]:
    """Time of the variant `over` divided by that of `under`."""

    def figures(rows: Rows) -> tuple[float, float] | None:
        a, b = rows.get(over), rows.get(under)
        if a is None or b is None or not (a.median_ms and b.median_ms and a.min_ms and b.min_ms):
            return None
        return a.median_ms / b.median_ms, a.min_ms / b.min_ms

    return figures


def peak_ratio(over: str, under: str) -> Callable[[Rows], tuple[float, float] | None]:
    """Peak memory of the variant `over` divided by that of `under`."""

    def figures(rows: Rows) -> tuple[float, float] | None:
        a, b = rows.get(over), rows.get(under)
        if a is None or b is None or a.peak_bytes is None or not b.peak_bytes:
            return None
        return a.peak_bytes / b.peak_bytes, a.peak_bytes / b.peak_bytes

    return figures


def format_figure(value: float | None) -> str:
    """Three significant digits, without an exponent where there need not be one."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_row(row: Row) -> tuple[str, ...]:
    """The cells below HEADER."""
    peak = None if row.peak_bytes is None else row.peak_bytes / 2**20
    times = (row.median_ms, row.min_ms, row.p20_ms, row.p80_ms, peak)
    error = "-" if row.max_abs_err is None else f"{row.max_abs_err:.1e}"
    return (row.variant, *map(format_figure, times), error, format_figure(row.ratio_to_roof))


def judge_targets(targets: Sequence[Target], rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Text, figure and verdict of each target."""
    by_name = {row.variant: row for row in rows}
    return [(target.text, *target.judge(by_name)) for target in targets]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a document."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
