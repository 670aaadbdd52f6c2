"""A comparison of runs on screen, as Markdown, as JSON and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fipo_megatron.observability.compare import (
    PAIRED,
    QUANTITIES,
    SHARE_OF_WEIGHTS,
    Difference,
    Estimate,
    Group,
)
from fipo_megatron.observability.plots import BAND_OPACITY, finish_axes

INTERVAL = "95 % t-interval over seeds"
# Okabe and Ito's colours: told apart also by people who do not see red and green apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
PANELS = (
    ("eval/sampled_accuracy", "Held-out accuracy, sampled"),
    ("rollout/response_tokens_mean", "Response length in training [tokens]"),
    ("train/entropy", "Entropy [nats per token]"),
    (SHARE_OF_WEIGHTS, "Share of influence weights other than 1"),
)
NOT_RECORDED = "-"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in GitHub's Markdown, numbers to the right."""
        lines = [self.header, ("---", *["---:"] * (len(self.header) - 1)), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def comparison_tables(groups: Sequence[Group], differences: Sequence[Difference]) -> list[Table]:
    """Means by group, and the paired differences if there are any."""
    rows = [
        (
            _name(group.task, group.label),
            str(len(group.runs)),
            *(_cell(group.estimate(quantity), quantity.form) for quantity in QUANTITIES),
        )
        for group in groups
    ]
    header = ("runs", "seeds", *(quantity.name for quantity in QUANTITIES))
    tables = [Table(f"held-out accuracy and length, mean ± half the {INTERVAL}", header, tuple(rows))]
    if differences:
        header = ("difference, seed by seed", "seeds", *(quantity.name for quantity in PAIRED))
        rows = [
            (
                _name(difference.task, f"{difference.second} - {difference.first}"),
                str(len(difference.seeds)),
                *(_cell(e, "+" + q.form) for e, q in zip(difference.estimates, PAIRED, strict=True)),
            )
            for difference in differences
        ]
        tables.append(Table(f"paired differences, mean ± half the {INTERVAL}", header, tuple(rows)))
    return tables


def comparison_json(groups: Sequence[Group], differences: Sequence[Difference]) -> dict[str, Any]:
    """The numbers of the tables, unrounded; None for what is not recorded, or has no interval."""
    return {
        "interval": INTERVAL,
        "groups": [
            {"task": group.task, "label": group.label, "runs": [str(run.folder) for run in group.runs]}
            | {"seeds": [run.seed for run in group.runs]}
            | {quantity.name: _plain(group.estimate(quantity)) for quantity in QUANTITIES}
            for group in groups
        ],
        "differences": [
            {"task": d.task, "first": d.first, "second": d.second, "seeds": list(d.seeds)}
            | {q.name: _plain(estimate) for q, estimate in zip(PAIRED, d.estimates, strict=True)}
            for d in differences
        ],
    }


def plot_comparison(groups: Sequence[Group], path: Path, title: str) -> None:
    """Draws a row of panels for each task: mean over seeds with its interval as a band, a colour for each label."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(group.band(panel[0])[0] for group in groups)]
    if not panels:
        raise ValueError(f"no metric to plot: no run has any of {', '.join(key for key, _ in PANELS)}")
    tasks = list(dict.fromkeys(group.task for group in groups))
    labels = list(dict.fromkeys(group.label for group in groups))
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    figure = Figure(figsize=(4.6 * len(panels), 3.6 * len(tasks) + 0.7), layout="constrained")
    figure.suptitle(f"{title}\nmean over seeds, band: {INTERVAL}", fontsize=12)
    for row, task in zip(figure.subplots(len(tasks), len(panels), squeeze=False), tasks, strict=True):
        members = [group for group in groups if group.task == task]
        for ax, (key, name) in zip(row, panels, strict=True):
            for group in members:
                _draw_band(ax, group, key, colors[group.label])
            finish_axes(ax, _name(task if len(tasks) > 1 else "", name))
            if key == "eval/sampled_accuracy":
                ax.set_ylim(0, 1.03)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_band(ax: Any, group: Group, key: str, color: str) -> None:
    steps, estimates = group.band(key)
    if not steps:
        return
    means = [estimate.mean for estimate in estimates]
    num = len(group.runs)
    label = f"{group.label} ({num} seed{'s' if num > 1 else ''})"
    style = "o-" if key.startswith("eval/") else "-"
    ax.plot(steps, means, style, color=color, label=label, linewidth=1.8, markersize=4)
    if estimates[0].half_width is not None:
        low, high = ([e.mean + sign * (e.half_width or 0.0) for e in estimates] for sign in (-1, 1))
        ax.fill_between(steps, low, high, color=color, alpha=BAND_OPACITY, linewidth=0)


def _name(task: str, label: str) -> str:
    return f"{task}: {label}" if task else label


def _cell(estimate: Estimate | None, form: str) -> str:
    return NOT_RECORDED if estimate is None else estimate.format(form)


def _plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else asdict(estimate)
