"""What becomes of responses while the engine samples others: put back in order, or judged a group at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

from fipo_megatron.rollout.collect import group_samples
from fipo_megatron.types import Decode, FinishedResponse, Generation, Judge, Prompt, SampleGroup


async def gather_responses(responses: AsyncIterator[FinishedResponse], num_requests: int) -> list[Generation]:
    """All generations of a stream, one a request, in order."""
    return in_request_order([response async for response in responses], num_requests)


def in_request_order(responses: Iterable[FinishedResponse], num_requests: int) -> list[Generation]:
    """The generations, one a request, in order; a RuntimeError if a request has none: it is the engine's fault."""
    by_index = dict(responses)
    _check_complete(len(by_index), num_requests)
    return [by_index[index] for index in range(num_requests)]


async def judge_while_sampling(
    prompts: Sequence[Prompt],
    responses: AsyncIterator[FinishedResponse],
    samples_per_prompt: int,
    judge: Judge,
    decode: Decode,
) -> list[SampleGroup | None]:
    """One judged group for every prompt, None where a response could not be judged: `group_samples` of a stream.

    A group is judged in a thread when its last response is there, while others are sampled; those that are completed
    meanwhile come next, in one call. The groups are in prompt order, and are handed out when all of them are finished:
    to train on those that are finished first would be to prefer short responses, and no run could be repeated.

    Raises:
        RuntimeError: a request got no response, or what `group_samples` and `judge` raise, as soon as they do.
    """
    received: list[dict[int, Generation]] = [{} for _ in prompts]  # of each prompt, by sample
    complete: asyncio.Queue[int] = asyncio.Queue()  # prompts that have all their responses
    judged: dict[int, SampleGroup | None] = {}

    async def receive() -> None:
        async for index, generation in responses:
            prompt, sample = divmod(index, samples_per_prompt)
            received[prompt][sample] = generation
            if len(received[prompt]) == samples_per_prompt:
                complete.put_nowait(prompt)
        _check_complete(sum(map(len, received)), len(prompts) * samples_per_prompt)

    async def judge_complete() -> None:
        while len(judged) < len(prompts):
            batch = [await complete.get()]
            while not complete.empty():
                batch.append(complete.get_nowait())
            generations = [received[prompt][sample] for prompt in batch for sample in range(samples_per_prompt)]
            groups = await asyncio.to_thread(
                group_samples, [prompts[prompt] for prompt in batch], generations, samples_per_prompt, judge, decode
            )
            judged.update(zip(batch, groups, strict=True))

    tasks = [asyncio.ensure_future(part) for part in (receive(), judge_complete())]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # where one failed, the other has nothing to wait for
            task.cancel()
    return [judged[prompt] for prompt in range(len(prompts))]


def _check_complete(num_responses: int, num_requests: int) -> None:
    if num_responses != num_requests:
        raise RuntimeError(f"the engine returned responses to {num_responses} of {num_requests} requests")
