"""Times against a clock that the test moves."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fipo_megatron.observability.timers import STEP, PhaseTimers, Span, SpanRecorder


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_phases_add_up_and_start_afresh(clock: Clock) -> None:
    timers = PhaseTimers()
    for seconds in (1.0, 2.5):
        with timers.phase("rollout"):
            clock.now += seconds
    clock.now += 0.5
    with timers.phase("train"):
        clock.now += 4.0
    assert timers.collect() == {"time/rollout_s": 3.5, "time/train_s": 4.0, "time/step_s": 8.0}
    clock.now += 2.0
    assert timers.collect() == {"time/step_s": 2.0}


def test_a_listener_hears_each_phase_begin_and_end(clock: Clock) -> None:
    heard: list[str | None] = []
    timers = PhaseTimers(heard.append)
    with timers.phase("rollout"):
        assert heard == ["rollout"]
    with pytest.raises(KeyError), timers.phase("train"):
        raise KeyError
    assert heard == ["rollout", None, "train", None]


def test_a_phase_that_raises_is_timed(clock: Clock) -> None:
    timers = PhaseTimers()

    def advance_and_raise() -> None:
        with timers.phase("sync"):
            clock.now += 3.0
            raise KeyError

    with pytest.raises(KeyError):
        advance_and_raise()
    assert timers.collect()["time/sync_s"] == 3.0


def test_phases_are_spans_as_well_where_there_is_a_recorder(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: round(clock.now * 1e9))
    timers = PhaseTimers()
    timers.recorder = SpanRecorder()
    clock.now -= 5.0
    timers.restart()
    clock.now += 6.0
    with timers.phase("rollout"):
        clock.now += 2.0
    clock.now += 0.5
    assert timers.collect() == {"time/rollout_s": 2.0, "time/step_s": 8.5}
    second = 1_000_000_000
    step = Span(STEP, 95 * second, 103 * second + second // 2)
    assert timers.recorder.take() == [Span("rollout", 101 * second, 103 * second), step]
    assert step.seconds == 8.5


def test_a_recorder_keeps_what_raises_and_what_is_within(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(time, "time_ns", lambda: next(now))
    recorder = SpanRecorder()
    ranges: list[str] = []

    @contextmanager
    def annotate(name: str) -> Iterator[None]:
        ranges.append(name)
        yield

    def fail(value: int) -> int:
        if value < 0:
            raise KeyError
        return value + 1

    timed = recorder.timed("inner", fail)
    with recorder.span("outer"):
        assert timed(1) == 2
    recorder.annotate = annotate
    with pytest.raises(KeyError):
        timed(-1)
    recorder.add("elsewhere", 7, 9)
    assert recorder.take() == [("inner", 1, 2), ("outer", 0, 3), ("inner", 4, 5), ("elsewhere", 7, 9)]
    assert ranges == ["inner"]
    assert recorder.take() == []


def test_the_cost_of_a_span_leaves_none_behind() -> None:
    recorder = SpanRecorder()
    assert 0 < recorder.cost_of_span() < 1e-3
    assert recorder.take() == []
