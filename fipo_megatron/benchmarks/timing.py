"""How long calls take, in turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_SAMPLES = 3  # also of a call that is slower than the seconds it is given
FLUSH_BYTES = 512 * 2**20  # several times the second-level cache of any GPU
NUM_FLUSHES = 8  # about 1 ms: longer than the host takes to check the arguments of a call and to launch its kernels

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Call:
    """What is timed, and what has to be done before each time, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the samples of one call."""

    median_ms: float
    min_ms: float
    p20_ms: float
    p80_ms: float
    num_samples: int


def measure(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    num_samples: int = 20,
    max_seconds: float = math.inf,
    on_round: Callable[[int], None] = lambda number: None,
) -> dict[str, list[float]]:
    """Milliseconds of each call, by its name: `num_samples`, or fewer once its own samples have taken `max_seconds`.

    Rounds go through the calls in turns forwards and backwards (A B, B A): a drift adds the same to each. A call has at
    least MIN_SAMPLES samples. `on_round` is told the number of rounds done.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(num_samples):
        left = [name for name, found in times.items() if len(found) < MIN_SAMPLES or sum(found) < 1e3 * max_seconds]
        for name in left if number % 2 == 0 else reversed(left):
            prepare = calls[name].prepare
            if prepare is not None:
                prepare()
            times[name].append(clock(calls[name].run))
        on_round(number + 1)
    return times


def summarize(times: list[float]) -> Timing:
    """The quantiles of at least one sample, in ms; between two samples by linear interpolation."""
    ordered = sorted(times)
    return Timing(quantile(ordered, 0.5), ordered[0], quantile(ordered, 0.2), quantile(ordered, 0.8), len(ordered))


def quantile(ordered: list[float], share: float) -> float:
    """The value below which `share` of the ascending `ordered` lies."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def make_clock(device: torch.device) -> Clock:
    """The clock of a device: of the host, or of CUDA events."""
    return CudaClock(device) if device.type == "cuda" else time_on_host


def time_on_host(run: Callable[[], object]) -> float:
    """Milliseconds of a call; what it returns is freed afterwards."""
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result
    return 1e3 * elapsed


class CudaClock:
    """Milliseconds between two events around a call.

    Before each call a buffer is written that is larger than the caches: no input is found there, and while the device
    is busy with it the host gets ahead, so that launches of small kernels are not timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(NUM_FLUSHES):
            self._flush.zero_()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end))
