"""Wall-clock seconds of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimers:
    """Adds up the time spent in named phases until it is collected, once a step.

    `on_phase` is told the name of a phase that begins, and None when it ends.
    """

    def __init__(self, on_phase: Callable[[str | None], None] | None = None) -> None:
        self._on_phase = on_phase
        self._phases: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block as part of phase `name`, also when the block raises."""
        start = time.perf_counter()
        self._tell(name)
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start
            self._tell(None)

    def collect(self) -> dict[str, float]:
        """Seconds as `time/<phase>_s`, and `time/step_s` since the last collection; starts afresh."""
        now = time.perf_counter()
        seconds = {f"time/{name}_s": value for name, value in self._phases.items()}
        seconds["time/step_s"] = now - self._start
        self._phases, self._start = {}, now
        return seconds

    def _tell(self, phase: str | None) -> None:
        if self._on_phase is not None:
            self._on_phase(phase)
