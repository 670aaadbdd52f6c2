"""Which of several failures is told as the cause."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import ActorDiedError

from fipo_megatron.trainer.actor import WorkerError, _cause, _gather

LOST_PEER = RuntimeError("[gloo/transport/tcp/pair.cc:541] Connection closed by peer [127.0.0.1]:1234")


def test_a_death_comes_before_what_its_peers_saw() -> None:
    error = _cause({"policy rank 0": LOST_PEER, "policy rank 1": ActorDiedError()}, [], "update", 10)
    assert isinstance(error, WorkerError)
    assert str(error).startswith("policy rank 1 died during update")


def test_an_error_of_ones_own_comes_before_a_lost_peer() -> None:
    error = _cause({"policy rank 0": LOST_PEER, "policy rank 1": ValueError("loss is nan")}, [], "update", 10)
    assert isinstance(error, ValueError)
    assert error.__notes__ == ["(raised by policy rank 1 during update)"]


def test_who_is_silent_while_others_lost_a_peer_hangs() -> None:
    error = _cause({"policy rank 0": LOST_PEER}, ["policy rank 1"], "update", 10)
    assert str(error).startswith("policy rank 1 did not answer update within 10 s, it hangs or is stopped")
    assert "policy rank 0 waited for it" in str(error)


def test_everyone_silent_is_a_timeout() -> None:
    error = _cause({}, ["engine"], "generate", 45)
    assert "engine did not answer generate within 45 s" in str(error)


def test_gather_keeps_the_order_and_stops_at_the_timeout() -> None:
    async def reply(value: int, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return value

    async def both(slow_s: float) -> list[int]:
        return await _gather({"a": reply(1, 0.05), "b": reply(2, slow_s)}, "port", 0.2)  # type: ignore[dict-item]

    assert asyncio.run(both(0.0)) == [1, 2]
    with pytest.raises(WorkerError, match="b did not answer port"):
        asyncio.run(both(5.0))
