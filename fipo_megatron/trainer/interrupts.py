"""Signals that end a run: they reach its task as a cancellation, and its command as KeyboardInterrupt."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catch_interrupts() -> Sequence[int]:
    """Have these signals raise KeyboardInterrupt, and list them; those that are ignored stay so: with nohup a run
    outlives its terminal."""
    interrupts = [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in interrupts:
        signal.signal(number, _interrupt)
    return interrupts


async def run_interruptibly(training: Coroutine[Any, Any, int], interrupts: Sequence[int]) -> int:
    """What `training` returns. Signals cancel the task: an exception out of a handler could end in a library's
    callback, and be lost there.

    Raises:
        KeyboardInterrupt: a signal came, and the task has ended.
    """
    loop, task, received = asyncio.get_running_loop(), asyncio.current_task(), []
    assert task is not None

    def cancel(number: int) -> None:
        received.append(number)
        task.cancel()
        for other in interrupts:  # a second one no longer waits for its turn
            loop.remove_signal_handler(other)
            signal.signal(other, _interrupt)

    for number in interrupts:
        loop.add_signal_handler(number, cancel, number)
    try:
        return await training
    except asyncio.CancelledError as error:
        if received:
            raise KeyboardInterrupt from error
        raise RuntimeError("the run was cancelled from within, and no signal came") from error


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
