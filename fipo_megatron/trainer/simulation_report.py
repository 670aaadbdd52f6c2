"""What simulated steps come to: tables, JSON, and a picture of one step over engines and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.observability.plots import BLUE, ORANGE, PHASE_COLORS
from fipo_megatron.observability.progress import print_table
from fipo_megatron.planner.efficiency import Efficiencies, efficiency_fields
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.trainer.simulation import RolloutTrace, SimulatedStep, SimulationInputs

TIME_BINS = 800  # of the picture's engines


class Line(NamedTuple):
    """A line of a table."""

    metric: str
    label: str
    scale: float = 1.0
    form: str = ".1f"
    target: float | None = None  # at most, in the metric's own unit


TABLES: tuple[tuple[str, tuple[Line, ...]], ...] = (
    (
        "Seconds of a step",
        (
            Line("time/rollout_s", "rollout"),
            Line("time/old_logprobs_s", "old log-probs"),
            Line("time/train_s", "train"),
            Line("time/sync_s", "sync"),
            Line("time/step_s", "whole step"),
        ),
    ),
    (
        "Lost [%]",
        (
            Line("cost/imbalance_frac", "data-parallel imbalance: slowest rank over the mean", 100, ".2f", 0.03),
            Line("cost/packing_waste_frac", "packing waste: padding, avoidable microbatches", 100, ".2f", 0.02),
            Line("cost/packing_unused_frac", "packing, all that holds no token", 100, ".2f"),
            Line("idle/data_ranks", "updates: ranks wait for the slowest", 100, ".2f"),
            Line("engines/tail", "rollout: engines wait for the slowest", 100),
            Line("idle/engines", "whole step: engines do nothing", 100),
            Line("idle/trainer", "whole step: trainer's ranks do nothing", 100),
            Line("idle/devices", "whole step: devices do nothing", 100),
        ),
    ),
    (
        "Samples and engines",
        (
            Line("rollout/generation_batches", "generation batches"),
            Line("rollout/generated_groups", "groups generated", form=",.0f"),
            Line("rollout/generated_groups_with_spread", "of these with spread", form=",.0f"),
            Line("rollout/trained_groups", "groups trained on", form=",.0f"),
            Line("rollout/surplus_kept", "groups kept for the next step", form=",.0f"),
            Line("rollout/stale_samples", "samples of an older policy", form=",.0f"),
            Line("rollout/age_mean", "steps since they were sampled, mean", form=".2f"),
            Line("rollout/age_max", "the same, largest", form=".0f"),
            Line("rollout/response_tokens_mean", "response tokens, mean", form=",.0f"),
            Line("rollout/response_tokens_max", "response tokens, largest", form=",.0f"),
            Line("engines/mean_running", "sequences that an engine decodes at once"),
            Line("engines/preemptions", "sequences stopped for want of room", form=",.0f"),
            Line("engines/recomputed_tokens", "tokens computed again for it", form=",.0f"),
            Line("engines/tokens_per_s", "tokens a second, all engines", form=",.0f"),
            Line("cost/microbatches", "microbatches of a rank, all updates", form=",.0f"),
        ),
    ),
    (
        "Planning [ms]",
        (
            Line("planning/step_ms", "all plans of a step"),
            Line("planning/ms_per_4096_samples", "for 4,096 samples", target=50.0),
        ),
    ),
)


def summarize(steps: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and 95th percentile over the steps that have a metric, by its name."""
    names = dict.fromkeys(name for metrics in steps for name in metrics)
    values = {name: np.array([metrics[name] for metrics in steps if name in metrics]) for name in names}
    return {
        name: {"mean": float(of_steps.mean()), "p95": float(np.quantile(of_steps, 0.95))}
        for name, of_steps in values.items()
    }


def print_report(steps: Sequence[dict[str, float]]) -> None:
    """Prints the tables."""
    summary = summarize(steps)
    stages = sorted((name for name in summary if name.startswith("bubble/")), key=lambda name: int(name[13:]))
    for title, lines in TABLES:
        shown = list(lines)
        if title == "Lost [%]":
            place = next(i for i, line in enumerate(shown) if line.metric == "idle/data_ranks")
            shown[place:place] = [Line(name, f"pipeline bubble of stage {name[13:]}", 100, ".2f") for name in stages]
        rows = [_row(line, summary[line.metric]) for line in shown if line.metric in summary]
        columns = ("", "mean", "p95", "target")
        num_columns = 4 if any(line.target is not None for line in shown) else 3
        print_table(title, columns[:num_columns], [row[:num_columns] for row in rows])


def _row(line: Line, values: dict[str, float]) -> tuple[str, ...]:
    mean, p95 = (format(values[name] * line.scale, line.form) for name in ("mean", "p95"))
    target = "" if line.target is None else f"<= {line.target * line.scale:g}"
    return line.label, mean, p95, target


def describe_inputs(lengths: Lengths, inputs: SimulationInputs, source: str) -> str:
    """The lengths, and what else a configuration does not say, on one line."""
    return (
        f"responses of {lengths.mean_response:,.0f} tokens on average, at most {lengths.response.max():,} ({source}); "
        f"acceptance_rate {inputs.acceptance_rate:g}, group_correlation {inputs.group_correlation:g}"
    )


def report_json(
    steps: Sequence[dict[str, float]], gpu: Gpu, efficiencies: Efficiencies, inputs: SimulationInputs, lengths: Lengths
) -> dict[str, Any]:
    """Plain JSON values: every step's metrics, their summary, and all that they were computed from."""
    return {
        "gpu": gpu.name,
        "efficiencies": {field.name: getattr(efficiencies, field.name) for field in efficiency_fields()},
        "inputs": dataclasses.asdict(inputs),
        "mean_response_tokens": lengths.mean_response,
        "steps": list(steps),
        "summary": summarize(steps),
    }


def plot_step(step: SimulatedStep, config: Config, path: Path) -> None:
    """Draws a step as SVG or PNG, by the path's ending: its phases, the batch of each engine over time, and what each
    stage of each data-parallel rank does in the first update.

    Raises:
        ValueError: another ending.
    """
    from matplotlib.figure import Figure

    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"--plot {path}: must end in .svg or .png")
    figure = Figure(figsize=(13, 10), layout="constrained")
    phases, engines, ranks = figure.subplots(3, 1, height_ratios=(0.35, 3, 4))
    _draw_phases(phases, step)
    _draw_engines(figure, engines, step.rollout)
    _draw_update(ranks, step, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_phases(ax: Any, step: SimulatedStep) -> None:
    start = 0.0
    for (phase, seconds), color in zip(step.phases.items(), PHASE_COLORS, strict=False):
        ax.barh(0, seconds, left=start, color=color, label=f"{phase} {seconds:,.0f} s")
        start += seconds
    ax.set_xlim(0, start)
    ax.set_yticks([])
    ax.set_title(f"Step {step.step}: {start:,.0f} s", loc="left", fontsize=11)
    ax.spines[:].set_visible(False)
    ax.legend(frameon=False, fontsize=9, ncols=len(step.phases), loc="upper right", bbox_to_anchor=(1, 2.1))


def _draw_engines(figure: Any, ax: Any, rollout: RolloutTrace) -> None:
    """Sequences in each engine's batch, a row an engine."""
    ax.set_title("Rollout: sequences that each engine decodes", loc="left", fontsize=11)
    ax.set_xlabel("seconds")
    ax.set_ylabel("engine")
    if not rollout.batches:
        ax.text(0.5, 0.5, "all groups are surplus of the step before", transform=ax.transAxes, ha="center")
        return
    times = (np.arange(TIME_BINS) + 0.5) / TIME_BINS * rollout.seconds
    running = np.zeros((len(rollout.batches[0]), TIME_BINS))
    start = 0.0
    for batch in rollout.batches:
        for engine, trace in enumerate(batch):
            place = np.searchsorted(trace.event_s, times - start, side="right") - 1
            running[engine] += np.where(place >= 0, trace.running[place], 0)  # 0 from an engine's last event on
        start += max(trace.seconds for trace in batch)
    image = ax.imshow(
        np.ma.masked_equal(running, 0),
        aspect="auto",
        interpolation="nearest",
        extent=(0, rollout.seconds, len(running) - 0.5, -0.5),
        cmap="viridis",
    )
    figure.colorbar(image, ax=ax, pad=0.01, label="sequences")


def _draw_update(ax: Any, step: SimulatedStep, config: Config) -> None:
    """A row for each stage of each data-parallel rank; white is waiting."""
    update, num_stages = step.updates[0], config.parallel.pipeline
    for rank, pipeline in enumerate(update.pipelines):
        for stage, spans in enumerate(pipeline.stages):
            row = rank * num_stages + stage
            for kind, color in (("forward", BLUE), ("backward", ORANGE)):
                bars = [(span.start_s, span.end_s - span.start_s) for span in spans if span.work.kind == kind]
                label = kind if row == 0 else None
                ax.broken_barh(bars, (row - 0.42, 0.84), facecolors=color, edgecolors="white", lw=0.3, label=label)
    num_rows = len(update.pipelines) * num_stages
    ax.set_ylim(num_rows - 0.5, -0.5)
    ax.set_xlim(0, update.seconds)
    if num_rows <= 40:
        names = [f"data {row // num_stages}, stage {row % num_stages}" for row in range(num_rows)]
        ax.set_yticks(range(num_rows), names, fontsize=7)
    else:
        ax.set_yticks(range(0, num_rows, 8 * num_stages), range(0, len(update.pipelines), 8))
        ax.set_ylabel(f"data-parallel rank, {num_stages} stage{'s' * (num_stages > 1)} each")
    ax.set_xlabel("seconds")
    ax.set_title(
        f"First update: {update.plan.num_microbatches} microbatches a rank; tensor- and context-parallel ranks do the "
        "same",
        loc="left",
        fontsize=11,
    )
    ax.legend(frameon=False, fontsize=9, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.09))
