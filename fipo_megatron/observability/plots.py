"""Learning curves of a run as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fipo_megatron.observability.metrics import read_metrics

BLUE, ORANGE, GREY = "#1f5fa8", "#d9741a", "#8a8a8a"
PHASE_COLORS = ("#1f5fa8", "#d9741a", "#3a8f5c", "#8c6bb1", "#b8a13a", "#c2528b", "#5aa7b8")
BAND_OPACITY = 0.15
SMALL_PHASE = 0.01


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    key: str
    label: str | None = None  # for the legend; a panel of one curve needs none
    color: str = BLUE
    band: tuple[str, str] | None = None  # keys of a lower and an upper bound, shaded
    error_key: str | None = None  # key of a standard error, shaded as +- 1
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    curves: tuple[Curve, ...]
    is_log: bool = False
    bounds: tuple[float | None, float | None] = (0, None)


PANELS = (
    Panel(
        "Accuracy",
        (
            Curve("rollout/accuracy", "training, sampled", GREY),
            Curve("eval/sampled_accuracy", "held out, sampled", BLUE, None, "eval/sampled_accuracy_stderr", "o-"),
            Curve("eval/greedy_accuracy", "held out, greedy", ORANGE, None, "eval/greedy_accuracy_stderr", "s-"),
        ),
        bounds=(0, 1.03),
    ),
    Panel(
        "Response length, mean and quartiles [tokens]",
        (
            Curve(
                "rollout/response_tokens_mean",
                band=("rollout/response_tokens_q25", "rollout/response_tokens_q75"),
            ),
        ),
        bounds=(None, None),
    ),
    Panel("Policy KL, old to new", (Curve("train/policy_kl"),), bounds=(None, None)),
    Panel("Clip fraction", (Curve("train/clip_frac"),)),
    Panel(
        "Engine-trainer log-prob mismatch",
        (Curve("rollout/mismatch_max", "max", ORANGE), Curve("rollout/mismatch_mean", "mean")),
        is_log=True,
        bounds=(None, None),
    ),
)


def plot_curves(metrics_path: Path, png_path: Path) -> None:
    """Draws accuracy, length, policy movement, mismatch and step time by step; the title is the run folder's name.

    A metrics file without a step is a ValueError; a panel without numbers says so.
    """
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_path)
    if not lines:
        raise ValueError(f"{metrics_path}: no steps to plot; let the run finish at least one step")
    figure = Figure(figsize=(15, 8), layout="constrained")
    figure.suptitle(metrics_path.resolve().parent.name, fontsize=14, fontweight="bold")
    axes = figure.subplots(2, 3).flat
    for panel, ax in zip(PANELS, axes, strict=False):
        _draw_panel(ax, panel, lines)
    _draw_step_time(axes[len(PANELS)], lines)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = png_path.with_name(f".{png_path.name}")  # who follows a run never sees half a figure
    figure.savefig(unfinished, format="png", dpi=120)
    unfinished.replace(png_path)


def _draw_panel(ax: Any, panel: Panel, lines: Sequence[dict[str, Any]]) -> None:
    for curve in panel.curves:
        steps, values = _series(lines, curve.key)
        if not steps:
            continue
        ax.plot(steps, values, curve.style, color=curve.color, label=curve.label, linewidth=1.8, markersize=5)
        if curve.band:
            (low_steps, low), (_, high) = (_series(lines, key) for key in curve.band)
            ax.fill_between(low_steps, low, high, color=curve.color, alpha=BAND_OPACITY, linewidth=0)
        if curve.error_key:
            error_steps, errors = _series(lines, curve.error_key)
            assert error_steps == steps, f"{curve.key} and {curve.error_key} are written at different steps"
            low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
            ax.fill_between(steps, low, high, color=curve.color, alpha=BAND_OPACITY, linewidth=0)
    if panel.is_log and ax.lines:
        ax.set_yscale("log")
    ax.set_ylim(*panel.bounds)
    finish_axes(ax, panel.title)


def _draw_step_time(ax: Any, lines: Sequence[dict[str, Any]]) -> None:
    """Phases stacked under the whole step: what is left between them and the line is unaccounted for."""
    steps, totals = _series(lines, "time/step_s")
    if steps:
        stacks = stack_phases([line for line in lines if "time/step_s" in line])
        colors = [PHASE_COLORS[i % len(PHASE_COLORS)] for i in range(len(stacks))]
        ax.stackplot(steps, *stacks.values(), labels=list(stacks), colors=colors, alpha=0.7)
        ax.plot(steps, totals, color="black", linewidth=1, label="whole step")
        ax.set_ylim(0, 1.4 * max(totals))  # room for the legend
    finish_axes(ax, "Step time [s]", legend_columns=3)


def stack_phases(lines: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds of each phase by line; phases that take less than SMALL_PHASE of all time are `other` together."""
    least = SMALL_PHASE * sum(line["time/step_s"] for line in lines)
    keys = {key for line in lines for key in line if key.startswith("time/") and key.endswith("_s")} - {"time/step_s"}
    seconds = {key: [line.get(key, 0.0) for line in lines] for key in sorted(keys)}
    small = [values for values in seconds.values() if sum(values) < least]
    stacks = {
        key.removeprefix("time/").removesuffix("_s"): values for key, values in seconds.items() if sum(values) >= least
    }
    return {**stacks, **({"other": [sum(values) for values in zip(*small, strict=True)]} if small else {})}


def finish_axes(ax: Any, title: str, legend_columns: int = 1) -> None:
    """Gives drawn axes their title and look; without a curve they say that nothing is recorded."""
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel("step")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, fontsize=9, ncols=legend_columns)
    elif not ax.lines:
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", color=GREY)


def _series(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that hold `key`."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in points], [value for _, value in points]
