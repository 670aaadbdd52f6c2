"""Several engines that share the requests out, as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from fipo_megatron.rollout.client import RolloutClient
from fipo_megatron.types import FinishedResponse, GenerationRequest, SamplingSettings


class Replicas:
    """Engines with the same weights; `engines` may change between two calls."""

    def __init__(self, engines: Sequence[RolloutClient]) -> None:
        self.engines = list(engines)

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> AsyncIterator[FinishedResponse]:
        """One response a request, in the order in which they are finished; the first failure of an engine is raised.

        The streams of the other engines are then not read to their ends.
        """
        shares = share_out(requests, len(self.engines))
        finished: asyncio.Queue[FinishedResponse | Exception | None] = asyncio.Queue()

        async def read(engine: RolloutClient, share: list[int]) -> None:
            try:
                async for index, generation in engine.generate([requests[i] for i in share], sampling):
                    finished.put_nowait((share[index], generation))
                finished.put_nowait(None)
            except Exception as error:
                finished.put_nowait(error)

        tasks = [
            asyncio.ensure_future(read(engine, share))
            for engine, share in zip(self.engines, shares, strict=True)
            if share
        ]
        try:
            num_running = len(tasks)
            while num_running:
                item = await finished.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()


def share_out(requests: Sequence[GenerationRequest], num_engines: int) -> list[list[int]]:
    """The indices of the requests that each engine serves: prompts in turn, all samples of a prompt at one engine,
    which then computes the prompt once."""
    engine_of: dict[tuple[int, ...], int] = {}
    shares: list[list[int]] = [[] for _ in range(num_engines)]
    for index, request in enumerate(requests):
        engine = engine_of.setdefault(request.prompt_ids, len(engine_of) % num_engines)
        shares[engine].append(index)
    return shares
