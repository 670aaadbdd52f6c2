"""Requests shared out among engines, and their streams merged into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest

from fipo_megatron.rollout.replicas import Replicas, share_out
from fipo_megatron.types import FinishedResponse, Generation, GenerationRequest, SamplingSettings

GREEDY = SamplingSettings(0.0, 1.0, 8)
REQUESTS = [GenerationRequest((prompt,), seed=10 * prompt + sample) for prompt in range(3) for sample in range(2)]


class ScriptedEngine:
    """Answers each request with its seed as the token, the last request first, and then fails if told to."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.requests: list[GenerationRequest] = []
        self.was_cancelled = False

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> AsyncIterator[FinishedResponse]:
        self.requests = list(requests)
        assert sampling == GREEDY
        try:
            for index in reversed(range(len(requests))):
                await asyncio.sleep(0)
                yield index, Generation(np.array([requests[index].seed]), np.zeros(1), "stop", 0)
            if self.failure is not None:
                raise self.failure
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


def collect(engines: list[ScriptedEngine]) -> list[tuple[int, int]]:
    async def run() -> list[tuple[int, int]]:
        stream = Replicas(engines).generate(REQUESTS, GREEDY)
        return [(index, int(generation.token_ids[0])) async for index, generation in stream]

    return asyncio.run(run())


@pytest.mark.parametrize("num_engines", [1, 2, 5])
def test_every_request_is_answered_under_its_own_index(num_engines: int) -> None:
    engines = [ScriptedEngine() for _ in range(num_engines)]
    responses = collect(engines)
    assert sorted(responses) == [(index, request.seed) for index, request in enumerate(REQUESTS)]
    assert [len(engine.requests) for engine in engines] == {1: [6], 2: [4, 2], 5: [2, 2, 2, 0, 0]}[num_engines]


def test_samples_of_a_prompt_stay_together() -> None:
    assert share_out(REQUESTS, 2) == [[0, 1, 4, 5], [2, 3]]


def test_the_first_failure_is_raised() -> None:
    slow, broken = ScriptedEngine(), ScriptedEngine(RuntimeError("engine 1 died"))
    with pytest.raises(RuntimeError, match="engine 1 died"):
        collect([slow, broken])
