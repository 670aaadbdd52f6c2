"""The live panel of a run in a terminal: step, phase at work, latest metrics, where the last step's time went."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.panel import Panel

# Metric, name on screen, format; step_summary shows them in this order.
SHOWN = (
    ("rollout/accuracy", "accuracy", ".3f"),
    ("eval/sampled_accuracy", "held-out", ".3f"),
    ("eval/greedy_accuracy", "greedy", ".3f"),
    ("rollout/reward_mean", "reward", ".3f"),
    ("rollout/response_tokens_mean", "tokens", ".1f"),
    ("rollout/generated_groups", "groups", ".0f"),  # 0: the step trains on surplus, so it has no accuracy and reward
    ("train/entropy", "entropy", ".3f"),
    ("train/policy_kl", "kl", ".1e"),
    ("train/clip_frac", "clipped", ".4f"),
    ("train/grad_norm", "grad", ".2f"),
    ("train/updates", "updates", ".0f"),
    ("rollout/mismatch_max", "mismatch", ".1e"),
    ("time/tokens_per_second_generated", "tokens/s", ".0f"),
    ("time/tokens_per_second_trained", "trained/s", ".0f"),
    ("time/step_s", "seconds", ".2f"),
)
METRICS_A_ROW = 4
RECENT_STEPS = 20  # whose mean time foretells that of the steps to come: responses grow longer during a run


def step_summary(metrics: Mapping[str, float]) -> str:
    """The shown metrics that a step has, on one line."""
    return "  ".join(f"{name} {metrics[key]:{form}}" for key, name, form in SHOWN if key in metrics)


def format_duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class TrainingState:
    """What is known of a run in training: its latest metrics, the phase at work, and the time that is left."""

    def __init__(self) -> None:
        self.step = 0
        self.num_steps = 0
        self.metrics: dict[str, float] = {}  # the latest of each
        self.phases: dict[str, float] = {}  # seconds of the last step
        self._recent = deque[float](maxlen=RECENT_STEPS)
        self._phase: str | None = None
        self._phase_start = 0.0

    def begin_phase(self, name: str | None) -> None:
        """Notes which phase is at work; None: none that is timed."""
        self._phase, self._phase_start = name, time.perf_counter()

    def finish_step(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Takes in a step. Step 0 is the evaluation before training: its time foretells nothing."""
        self.step, self.num_steps = step, num_steps
        self.metrics |= metrics
        self.phases = {
            key.removeprefix("time/").removesuffix("_s"): value
            for key, value in metrics.items()
            if key.startswith("time/") and key.endswith("_s") and key != "time/step_s"
        }
        if step > 0 and "time/step_s" in metrics:
            self._recent.append(metrics["time/step_s"])

    @property
    def seconds_left(self) -> float | None:
        """Of the steps to come, at the mean time of the recent ones; None before the first and after the last."""
        left = self.num_steps - self.step
        return left * sum(self._recent) / len(self._recent) if self._recent and left > 0 else None

    def panel(self) -> Panel:
        """The panel as it is now, for rich to draw."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2, 0, 0), expand=True)
        head.add_column(style="bold", ratio=1)
        head.add_column(ratio=2)
        head.add_row(self._phase_line(), ProgressBar(total=max(self.num_steps, 1), completed=self.step))
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for _ in range(METRICS_A_ROW):
            table.add_column(style="dim")
            table.add_column(justify="right", ratio=1)
        cells = [(name, f"{self.metrics[key]:{form}}") for key, name, form in SHOWN if key in self.metrics]
        for start in range(0, len(cells), METRICS_A_ROW):
            table.add_row(*(text for cell in cells[start : start + METRICS_A_ROW] for text in cell))
        times = "  ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items() if seconds >= 0.05)
        left = self.seconds_left
        title = f"step {self.step}/{self.num_steps}" + ("" if left is None else f"  ETA {format_duration(left)}")
        return Panel(
            Group(head, table, Text(f"last step [s]  {times}" if times else "", style="dim")),
            title=title,
            title_align="left",
        )

    def _phase_line(self) -> str:
        if self._phase is None:
            return ""
        return f"{self._phase} {time.perf_counter() - self._phase_start:.1f} s"
