"""Signals to a run: cancelled at its next wait, or left alone where they are ignored."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from fipo_megatron.trainer.interrupts import catch_interrupts, run_interruptibly


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_run_which_ends_in_its_own_time(own_signals: None, number: int) -> None:
    signal.signal(number, signal.SIG_DFL)  # in the background a shell has some ignored
    ended = []

    async def training() -> int:
        try:
            os.kill(os.getpid(), number)
            await asyncio.sleep(60)
        finally:
            ended.append(True)
        return 0

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run_interruptibly(training(), catch_interrupts()))
    assert ended == [True]


def test_a_run_ends_by_itself(own_signals: None) -> None:
    async def training() -> int:
        return 7

    assert asyncio.run(run_interruptibly(training(), catch_interrupts())) == 7


def test_a_cancellation_without_a_signal_is_a_failure(own_signals: None) -> None:
    async def training() -> int:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="cancelled from within"):
        asyncio.run(run_interruptibly(training(), catch_interrupts()))


def test_what_is_ignored_stays_so(own_signals: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signal.SIGHUP not in catch_interrupts()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
