"""Times against a clock that the test moves."""

import time

import pytest

from fipo_megatron.observability.timers import PhaseTimers


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
