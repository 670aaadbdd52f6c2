"""What the panel shows, drawn into text, and the time it foretells."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from fipo_megatron.observability.live_panel import RECENT_STEPS, TrainingState, format_duration, step_summary


def draw(state: TrainingState, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(state.panel())
    return capture.get()


def test_summary_shows_known_metrics_only() -> None:
    metrics = {"rollout/accuracy": 0.25, "train/policy_kl": 0.00123, "time/step_s": 2.5, "train/loss": 9.0}
    assert step_summary(metrics) == "accuracy 0.250  kl 1.2e-03  seconds 2.50"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7630, "2 h 07 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_time_left_is_that_of_recent_training_steps() -> None:
    state = TrainingState()
    assert state.seconds_left is None
    state.finish_step(0, 100, {"time/step_s": 1000.0})  # the evaluation before training
    assert state.seconds_left is None
    state.finish_step(1, 100, {"time/step_s": 9.0})
    assert state.seconds_left == 99 * 9
    for step in range(2, 2 + RECENT_STEPS):
        state.finish_step(step, 100, {"time/step_s": 2.0 + step % 2})
    assert state.seconds_left == (100 - 1 - RECENT_STEPS) * 2.5
    state.finish_step(100, 100, {"time/step_s": 2.0})
    assert state.seconds_left is None


def test_the_panel_shows_the_phase_the_latest_metrics_and_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainingState()
    assert "step 0/0" in draw(state)
    state.finish_step(1, 4, {"rollout/accuracy": 0.25, "eval/sampled_accuracy": 0.5, "time/step_s": 3.0})
    times = {"time/rollout_s": 1.5, "time/train_s": 0.75, "time/step_s": 3.0, "time/tokens_per_second_trained": 812.4}
    state.finish_step(2, 4, {"rollout/accuracy": 0.375} | times)
    monkeypatch.setattr(time, "perf_counter", lambda: 50.0)
    state.begin_phase("old_logprobs")
    monkeypatch.setattr(time, "perf_counter", lambda: 51.25)
    shown = draw(state)
    for text in ("step 2/4  ETA 6 s", "old_logprobs 1.2 s", "0.375", "0.500", "812", "rollout 1.5  train 0.8"):
        assert text in shown
    assert "0.250" not in shown
    state.begin_phase(None)
    assert "old_logprobs" not in draw(state)
