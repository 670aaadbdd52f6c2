"""Wall-clock seconds of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimers:
    """Adds up the time spent in named phases until it is collected, once a step."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block as part of phase `name`, also when the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def collect(self) -> dict[str, float]:
        """Seconds as `time/<phase>_s`, and `time/step_s` since the last collection; starts afresh."""
        now = time.perf_counter()
        seconds = {f"time/{name}_s": value for name, value in self._phases.items()}
        seconds["time/step_s"] = now - self._start
        self._phases, self._start = {}, now
        return seconds
