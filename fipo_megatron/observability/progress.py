"""What a person sees of a run: a live display in a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from fipo_megatron.observability.live_panel import TrainingState, format_duration, step_summary

if TYPE_CHECKING:
    from rich.console import RenderableType

NUM_TASK_LINES = 10  # how often a task reports where there is no terminal
PLAIN_WIDTH = 120  # of a table that goes to a file or a pipe


class Progress:
    """Progress of a run, as a context manager around all of it.

    In a terminal tasks are live bars, training is a live panel, and notes scroll above. Elsewhere (a pipe, a file, a
    batch job) notes and steps are plain lines, flushed at once.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        self._stream = sys.stdout if stream is None else stream
        console = Console(file=self._stream, highlight=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            *(BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn()),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        )
        self._bars = Bars(*columns, console=console, expand=True) if console.is_terminal else None
        self._training: TrainingState | None = None  # from the first phase on
        self._live = Live(console=console, get_renderable=self._draw) if console.is_terminal else None

    def note(self, text: str) -> None:
        """Prints one line."""
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._live.console.print(text, markup=False)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Says what the block does while it runs, and how long it took if it ended well."""
        start = time.perf_counter()
        if self._bars is None:
            self.note(f"{text} ...")
            yield
        else:
            bar = self._bars.add_task(text, total=None, text="")
            try:
                yield
            finally:
                self._bars.remove_task(bar)
        self.note(f"{text}: {time.perf_counter() - start:.1f} s")

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """Yields a function that the block calls after each of `total` parts, with a text such as the loss."""
        start, num_done, last_text = time.perf_counter(), 0, ""
        bar = None if self._bars is None else self._bars.add_task(name, total=total, text="")

        def advance(text: str) -> None:
            nonlocal num_done, last_text
            num_done, last_text = num_done + 1, text
            if self._bars is not None and bar is not None:
                self._bars.update(bar, completed=num_done, text=text)
            elif num_done * NUM_TASK_LINES // total > (num_done - 1) * NUM_TASK_LINES // total:
                self.note(f"{name} {num_done}/{total}  {text}")

        try:
            yield advance
        finally:
            if self._bars is not None and bar is not None:
                self._bars.remove_task(bar)
        self.note(f"{name}: {num_done} of {total} in {time.perf_counter() - start:.1f} s  {last_text}")

    def step(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Shows a finished step; in a terminal only steps with an evaluation stay on screen."""
        training = self._begin_training()
        training.finish_step(step, num_steps, metrics)
        if self._live is None or any(key.startswith("eval/") for key in metrics):
            left = training.seconds_left
            eta = "" if left is None else f"  ETA {format_duration(left)}"
            self.note(f"step {step}/{num_steps}  {step_summary(metrics)}{eta}")

    def phase(self, name: str | None) -> None:
        """Shows which phase of a step is at work; None: none."""
        self._begin_training().begin_phase(name)

    def _begin_training(self) -> TrainingState:
        if self._training is None:
            self._training = TrainingState()
        return self._training

    def _draw(self) -> RenderableType:
        from rich.console import Group

        assert self._bars is not None
        return self._bars if self._training is None else Group(self._bars, self._training.panel())

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO | None = None) -> None:
    """Prints a table of results: the first column names, the others are numbers, set to the right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(file=stream)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(table)
