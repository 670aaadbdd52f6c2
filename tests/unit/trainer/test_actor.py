"""Which of several failures is told as the cause, and streams that end, fail or fall silent."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import ActorDiedError

from fipo_megatron.config.schema import TimeoutsConfig
from fipo_megatron.observability.timers import SpanRecorder
from fipo_megatron.trainer.actor import EngineClient, PolicyClient, WorkerError, _cause, _gather
from fipo_megatron.trainer.profiled_policy import ProfileSettings
from fipo_megatron.types import SamplingSettings

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


class Replying:
    """An actor's method that replies."""

    def __init__(self, reply: Any) -> None:
        self._reply = reply

    async def remote(self, *_: Any) -> Any:
        return self._reply


def test_a_save_gives_the_files_of_all_ranks_and_a_load_whether_any_was_reseeded() -> None:
    ranks = [
        SimpleNamespace(finish_save=Replying(["__0_0.distcp", ".metadata"]), load_state=Replying(False)),
        SimpleNamespace(finish_save=Replying(["__1_0.distcp", ".metadata"]), load_state=Replying(True)),
    ]
    policy = PolicyClient(ranks, TimeoutsConfig())
    assert asyncio.run(policy.finish_save()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert asyncio.run(policy.load_state(Path("state"))) is True
    assert asyncio.run(PolicyClient(ranks[:1], TimeoutsConfig()).load_state(Path("state"))) is False


def test_the_end_of_a_profile_may_take_as_long_as_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces of 3 steps and the run's end, and pairs of gradients that are a call each."""
    waits = []

    async def gather(refs: dict[str, Any], method: str, timeout_s: float) -> list[str]:
        waits.append((method, timeout_s))
        return [await ref for ref in refs.values()]

    monkeypatch.setattr("fipo_megatron.trainer.actor._gather", gather)
    rank = SimpleNamespace(stop_recording=Replying(None), measure_pair=Replying(None), end_profile=Replying("recorded"))
    settings = ProfileSettings(Path(), after=1, num_steps=3, num_pairs=2)
    assert asyncio.run(PolicyClient([rank], TimeoutsConfig(call_s=100)).end_profile(settings)) == ["recorded"]
    assert waits == [("stop_recording", 400), ("measure_pair", 200), ("measure_pair", 200), ("end_profile", 100)]


def test_the_memory_of_an_engine_is_that_of_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of the process that answers has had 200 MiB, and gave them back. Of other tests' children, which come
    and go, none is looked at."""
    children: list[psutil.Process] = []
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: children)
    code = "held = bytearray(200 << 20); del held; print(flush=True); input()"
    actor = SimpleNamespace(__ray_call__=SimpleNamespace(remote=_answer))
    engine = EngineClient(actor, TimeoutsConfig())
    before = asyncio.run(engine.peak_memory_bytes())
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    children.append(psutil.Process(child.pid))
    after = asyncio.run(engine.peak_memory_bytes())
    child.communicate(b"\n")
    assert 200 << 20 < after - before < 260 << 20


async def _answer(function: Callable[[Any], Any]) -> Any:
    return function(None)


class StreamingActor:
    """What Ray gives for an actor whose `generate` streams: each item comes as something to wait for.

    Its items are lists of responses, errors, and numbers: seconds of silence.
    """

    def __init__(self, *items: Any) -> None:
        self._items = items

    @property
    def generate(self) -> StreamingActor:
        return self

    def options(self, num_returns: str) -> StreamingActor:
        assert num_returns == "streaming"
        return self

    async def remote(self, requests: Any, sampling: Any) -> AsyncIterator[Awaitable[Any]]:
        for item in self._items:
            if isinstance(item, float):
                await asyncio.sleep(item)
            else:
                yield self._result(item)

    async def _result(self, item: Any) -> Any:
        if isinstance(item, BaseException):
            raise item
        return item


def read(*items: Any, call_s: float = 5.0) -> tuple[list[Any], BaseException | None]:
    """What a client got of a stream of these items, and how the stream failed."""
    client = EngineClient(StreamingActor(*items), TimeoutsConfig(call_s=call_s))
    received: list[Any] = []

    async def read_all() -> None:
        async for response in client.generate([], SamplingSettings(1.0, 1.0, 8)):
            received.append(response)

    try:
        asyncio.run(read_all())
    except Exception as error:
        return received, error
    return received, None


def test_a_stream_gives_what_its_items_hold_and_ends() -> None:
    assert read([(3, "a"), (0, "b")], [(1, "c")]) == ([(3, "a"), (0, "b"), (1, "c")], None)
    assert read() == ([], None)


def test_the_time_limit_is_for_one_wait_and_not_for_the_whole_stream() -> None:
    items = [item for i in range(8) for item in (0.05, [(i, "")])]
    assert read(*items, call_s=0.2) == ([(i, "") for i in range(8)], None)


@pytest.mark.parametrize(
    ("last_item", "cause"),
    [
        (60.0, "engine did not answer generate within 0.2 s, it hangs or is stopped"),
        (ActorDiedError(), "engine died during generate"),
        (ValueError("no such token"), "no such token"),
    ],
)
def test_an_engine_that_falls_silent_or_fails_in_the_middle_is_named(last_item: Any, cause: str) -> None:
    received, error = read([(0, "a")], last_item, call_s=0.2)
    assert received == [(0, "a")]
    assert str(error).startswith(cause)


def test_a_profile_has_each_call_and_what_an_engine_says_of_an_update() -> None:
    async def answer(value: Any) -> Any:
        await asyncio.sleep(0.05)
        return value

    took = {"receive_s": 0.03, "verify_s": 0.01}
    calls = {"update_weights": took, "release_memory": None}
    actor = SimpleNamespace(
        **{name: SimpleNamespace(remote=lambda *_, value=value: answer(value)) for name, value in calls.items()}
    )
    client = EngineClient(actor, TimeoutsConfig())

    async def call_all() -> None:
        assert await client.update_weights({"version": 1}) == took  # not recorded
        client.recorder = SpanRecorder()
        assert await client.update_weights({"version": 2}) == took
        await client.release_memory()

    asyncio.run(call_all())
    assert client.recorder is not None
    update, receive, verify, release = client.recorder.take()
    assert [span.name for span in (update, receive, verify, release)] == [
        "update_weights", "receive", "verify", "release_memory",
    ]  # fmt: skip
    assert (receive.seconds, verify.seconds) == pytest.approx((0.03, 0.01))
    assert receive.start <= update.start < verify.start == receive.end
    assert release.seconds >= 0.05

    streaming = EngineClient(StreamingActor([(0, "a")], 0.05), TimeoutsConfig())
    streaming.recorder = SpanRecorder()

    async def read_all() -> None:
        assert [item async for item in streaming.generate([], SamplingSettings(1.0, 1.0, 8))] == [(0, "a")]

    asyncio.run(read_all())
    (generate,) = streaming.recorder.take()
    assert (generate.name, generate.seconds > 0.04) == ("generate", True)
