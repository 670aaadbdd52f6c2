"""Wall-clock time: seconds of the phases of a step, and spans of what a process does inside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

NUM_COST_SPANS = 2000  # by which the cost of one is measured
STEP = "step"  # name of the spans between two collections of the phases


class Span(NamedTuple):
    """Something that was done, in nanoseconds of `time.time_ns`: the processes of a host share this clock, those of
    several hosts as well as their hosts keep it."""

    name: str
    start: int
    end: int

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


class SpanRecorder:
    """Spans of one process, in the order of their ends. They may lie within each other.

    `annotate`, where it is set, gives a context in which each block runs: a range of another profiler's.
    """

    def __init__(self) -> None:
        self._marked: list[tuple[str, Any, Any]] = []
        self.annotate: Callable[[str], AbstractContextManager[Any]] | None = None

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Records the block, also when it raises."""
        start = self.mark()
        try:
            if self.annotate is None:
                yield
            else:
                with self.annotate(name):
                    yield
        finally:
            self._marked.append((name, start, self.mark()))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, of which every call is recorded."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return function(*args, **kwargs)

        return call

    def add(self, name: str, start: int, end: int) -> None:
        """Records what was measured elsewhere, in nanoseconds of `time.time_ns`."""
        self._marked.append((name, start, end))

    def take(self) -> list[Span]:
        """What was recorded since the last time."""
        taken, self._marked = self._marked, []
        return [Span(name, self.nanoseconds(start), self.nanoseconds(end)) for name, start, end in taken]

    def cost_of_span(self) -> float:
        """Seconds that it takes to record one, of which nothing is kept; not while others are to be taken."""
        start = time.perf_counter()
        for _ in range(NUM_COST_SPANS):
            with self.span("cost"):
                pass
        seconds = time.perf_counter() - start
        self.take()
        return seconds / NUM_COST_SPANS

    def mark(self) -> Any:
        """The moment, in whatever `nanoseconds` understands."""
        return time.time_ns()

    def nanoseconds(self, mark: Any) -> int:
        """A mark by `time.time_ns`."""
        return int(mark)


class PhaseTimers:
    """Adds up the time spent in named phases until it is collected, once a step. Phases don't lie within each other.

    `on_phase` is told the name of a phase that begins, and None when it ends. With `recorder` set each phase is a span
    of it, too, and the time between two collections one named `STEP`.
    """

    def __init__(self, on_phase: Callable[[str | None], None] | None = None) -> None:
        self._on_phase = on_phase
        self._phases: dict[str, float] = {}
        self._start, self._start_ns = time.perf_counter(), time.time_ns()
        self.recorder: SpanRecorder | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block as part of phase `name`, also when the block raises."""
        start = time.perf_counter()
        self._tell(name)
        try:
            with self._span(name):
                yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start
            self._tell(None)

    def collect(self) -> dict[str, float]:
        """Seconds as `time/<phase>_s`, and `time/step_s` since the last collection; starts afresh."""
        now, now_ns = time.perf_counter(), time.time_ns()
        seconds = {f"time/{name}_s": value for name, value in self._phases.items()}
        seconds["time/step_s"] = now - self._start
        if self.recorder is not None:
            self.recorder.add(STEP, self._start_ns, now_ns)
        self._phases, self._start, self._start_ns = {}, now, now_ns
        return seconds

    def restart(self) -> None:
        """Forgets what came before: the first step begins now."""
        self._phases, self._start, self._start_ns = {}, time.perf_counter(), time.time_ns()

    def _span(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.recorder is None else self.recorder.span(name)

    def _tell(self, phase: str | None) -> None:
        if self._on_phase is not None:
            self._on_phase(phase)
