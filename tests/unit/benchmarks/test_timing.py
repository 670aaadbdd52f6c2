"""The order of calls, their number, and the quantiles of their times; with a clock that is set by hand."""

import pytest
import torch

from fipo_megatron.benchmarks.timing import MIN_SAMPLES, Call, make_clock, measure, quantile, summarize


class Recorder:
    """Calls that write down their names, and a clock that gives each the next of its times."""

    def __init__(self, times: dict[str, float]) -> None:
        self.times, self.order, self.running = times, [], ""

    def call(self, name: str) -> Call:
        return Call(lambda: self.enter(name), lambda: self.order.append(f"prepare {name}"))

    def enter(self, name: str) -> None:
        self.order.append(name)
        self.running = name

    def clock(self, run) -> float:
        run()
        return self.times[self.running]


def test_calls_take_turns_forwards_and_backwards():
    recorder, rounds = Recorder({"a": 1.0, "b": 2.0, "c": 3.0}), []
    calls = {name: recorder.call(name) for name in "abc"}
    times = measure(calls, recorder.clock, num_samples=3, on_round=rounds.append)
    assert "".join(name for name in recorder.order if len(name) == 1) == "abccbaabc"
    assert recorder.order[:4] == ["prepare a", "a", "prepare b", "b"]
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}
    assert rounds == [1, 2, 3]


def test_a_slow_call_gets_fewer_samples():
    recorder = Recorder({"fast": 1.0, "slow": 400.0, "slower": 7000.0})
    calls = {name: recorder.call(name) for name in recorder.times}
    times = measure(calls, recorder.clock, num_samples=20, max_seconds=2.0)
    assert {name: len(found) for name, found in times.items()} == {"fast": 20, "slow": 5, "slower": MIN_SAMPLES}


def test_fewer_samples_than_the_least_can_be_asked_for():
    recorder = Recorder({"a": 1.0})
    assert measure({"a": recorder.call("a")}, recorder.clock, num_samples=1) == {"a": [1.0]}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.2, 1.8), (0.5, 3.0), (0.8, 4.2), (1.0, 5.0)])
def test_quantile(share, expected):
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], share) == pytest.approx(expected)


def test_summary():
    timing = summarize([40.0, 10.0, 20.0, 30.0])
    assert (timing.median_ms, timing.min_ms, timing.num_samples) == (25.0, 10.0, 4)
    assert (timing.p20_ms, timing.p80_ms) == pytest.approx((16.0, 34.0))
    assert summarize([7.0]).p80_ms == 7.0


def test_the_clock_of_the_host(monkeypatch):
    ticks = iter([10.0, 10.25])
    monkeypatch.setattr("fipo_megatron.benchmarks.timing.time.perf_counter", lambda: next(ticks))
    assert make_clock(torch.device("cpu"))(lambda: None) == 250.0
