"""Streams: put back in order, judged by whole groups beside the sampling, and the same whatever finished first."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import pytest

from fipo_megatron.rollout.collect import group_samples
from fipo_megatron.rollout.stream import gather_responses, in_request_order, judge_while_sampling
from fipo_megatron.types import FinishedResponse, Generation, Judge, Judgement, Prompt, SampleGroup

PROMPTS = [Prompt(f"train/{i}", (1, i), str(i), "arithmetic") for i in range(6)]
GROUP = 4
NUM_REQUESTS = len(PROMPTS) * GROUP


def response(index: int) -> FinishedResponse:
    tokens = np.array([index // GROUP, index], np.int32)
    return index, Generation(tokens, np.full(2, -0.25, np.float32), "stop", weight_version=3)


def decode(token_ids: np.ndarray) -> str:
    return " ".join(map(str, token_ids))


def judge(prompts: Sequence[Prompt], texts: Sequence[str], num_tokens: Sequence[int]) -> list[Judgement]:
    """By the prompt and text alone; the rule fails on response 9."""
    return [
        Judgement(float("nan"), 0.0, "[UNJUDGED]", failure="no such unit")
        if text == "2 9"
        else Judgement(float(text.split()[1]), float(text.startswith(prompt.ground_truth)), text)
        for prompt, text in zip(prompts, texts, strict=True)
    ]


async def stream(order: Sequence[int], wait: Callable[[int], float] = lambda i: 0.0) -> AsyncIterator[FinishedResponse]:
    for position, index in enumerate(order):
        await asyncio.sleep(wait(position))
        yield response(index)


def judged(responses: AsyncIterator[FinishedResponse], by: Judge = judge) -> list[SampleGroup | None]:
    return asyncio.run(judge_while_sampling(PROMPTS, responses, GROUP, by, decode))


def plain(groups: Sequence[SampleGroup | None]) -> list[object]:
    """Groups as values that compare."""
    return [
        group and [(s.response_ids.tolist(), s.reward, s.accuracy, s.text) for s in group.samples] for group in groups
    ]


def test_responses_are_put_back_in_the_order_of_the_requests() -> None:
    order = random.Random(0).sample(range(10), 10)
    for generations in (in_request_order(map(response, order), 10), asyncio.run(gather_responses(stream(order), 10))):
        assert [int(generation.token_ids[1]) for generation in generations] == list(range(10))
    assert in_request_order([], 0) == []


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1]])
def test_a_request_without_a_response_is_refused(order: list[int]) -> None:
    with pytest.raises(RuntimeError, match="the engine returned responses to 2 of 3 requests"):
        in_request_order(map(response, order), 3)
    with pytest.raises(RuntimeError, match=f"the engine returned responses to 2 of {NUM_REQUESTS} requests"):
        judged(stream(order))


@pytest.mark.parametrize("seed", range(8))
def test_groups_do_not_depend_on_the_order_or_the_pace_of_the_stream(seed: int) -> None:
    rng = random.Random(seed)
    order = rng.sample(range(NUM_REQUESTS), NUM_REQUESTS)
    at_once = group_samples(PROMPTS, [response(i)[1] for i in range(NUM_REQUESTS)], GROUP, judge, decode)
    groups = judged(stream(order, lambda position: rng.choice([0.0, 0.0, 0.002])))
    assert plain(groups) == plain(at_once)
    assert [i for i, group in enumerate(groups) if group is None] == [2]
    assert [group.prompt for group in groups if group] == [prompt for i, prompt in enumerate(PROMPTS) if i != 2]
    assert [sample.reward for sample in groups[1].samples] == [4.0, 5.0, 6.0, 7.0]  # type: ignore[union-attr]


def test_groups_are_judged_beside_the_sampling_and_queued_ones_together() -> None:
    calls: list[list[str]] = []
    first_is_judged, driver = threading.Event(), threading.get_ident()

    def slow_judge(prompts: Sequence[Prompt], texts: Sequence[str], num_tokens: Sequence[int]) -> list[Judgement]:
        assert threading.get_ident() != driver
        calls.append([prompt.uid for prompt in prompts[::GROUP]])
        assert first_is_judged.wait(timeout=5)
        return judge(prompts, texts, num_tokens)

    async def sample() -> AsyncIterator[FinishedResponse]:
        for index in range(GROUP):
            yield response(index)
        while not calls:  # the first group is in judgement before the others are sampled
            await asyncio.sleep(0.001)
        for index in range(GROUP, NUM_REQUESTS):
            yield response(index)
        first_is_judged.set()

    groups = judged(sample(), slow_judge)
    assert calls == [["train/0"], [f"train/{i}" for i in range(1, 6)]]
    assert [group.prompt.uid for group in groups if group] == [f"train/{i}" for i in (0, 1, 3, 4, 5)]


def test_a_failing_judge_does_not_wait_for_the_engine() -> None:
    def failing(prompts: Sequence[Prompt], texts: Sequence[str], num_tokens: Sequence[int]) -> list[Judgement]:
        raise RuntimeError("reward.max_unjudged_frac = 0.1")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="max_unjudged_frac"):
        judged(stream(range(NUM_REQUESTS), lambda position: 60.0 if position == GROUP else 0.0), failing)
    assert time.monotonic() - began < 5


def test_a_failing_engine_is_the_cause() -> None:
    async def dying() -> AsyncIterator[FinishedResponse]:
        yield response(0)
        raise ConnectionError("the engine died")

    with pytest.raises(ConnectionError, match="the engine died"):
        judged(dying())


def test_a_broken_response_is_refused_before_the_rest_is_sampled() -> None:
    async def broken() -> AsyncIterator[FinishedResponse]:
        for index in range(GROUP):
            yield index, Generation(np.array([1], np.int32), np.array([np.nan], np.float32), "stop", 0)
        await asyncio.sleep(60)

    with pytest.raises(RuntimeError, match="log-prob nan at response position 0 for prompt train/0"):
        judged(broken())
