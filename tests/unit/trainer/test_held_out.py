"""A run's evaluation against an engine whose answers follow from the seeds: counted again by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fipo_megatron.config.schema import Config, RewardConfig
from fipo_megatron.reward.judge import make_reward
from fipo_megatron.rollout.collect import sampling_seed
from fipo_megatron.trainer.held_out import HeldOutEvaluation
from fipo_megatron.types import FinishedResponse, Generation, GenerationRequest, Prompt, SamplingSettings

EASY = [Prompt(f"easy/{i}", (1,), "7", "") for i in range(6)]
HARD = [Prompt(f"hard/{i}", (1, 2), "9", "") for i in range(4)]
K = 3


class FakeEngine:
    """Says 7 or 8 by the seed; greedily 7."""

    def __init__(self) -> None:
        self.asked: list[SamplingSettings] = []

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> AsyncIterator[FinishedResponse]:
        """One token a request, the last request's first."""
        self.asked.append(sampling)
        for index, request in reversed(list(enumerate(requests))):
            yield index, self._answer(request.seed, sampling)

    def _answer(self, seed: int, sampling: SamplingSettings) -> Generation:
        answer = 7 if sampling.temperature == 0 else 7 + seed % 2
        return Generation(np.array([answer], np.int32), np.zeros(1, np.float32), "stop", 0)


def measure(
    folder: Path, engine: FakeEngine, sets: dict[str, list[Prompt]], others: Any = None, **sections: Any
) -> dict[str, float]:
    """`others`: rewards of sets that the configured one does not judge."""
    config = Config.model_validate({"seed": 5, "rollout": {"max_response_tokens": 12}, **sections})
    rewards = dict.fromkeys(sets, make_reward(config.reward, max_response_tokens=12)) | (others or {})
    evaluation = HeldOutEvaluation(config, sets, rewards, lambda ids: f"Answer: {ids[0]}", folder)
    return asyncio.run(evaluation.measure(engine, 20))  # type: ignore[arg-type]


def read_table(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_several_samples_of_several_sets(tmp_path: Path) -> None:
    engine = FakeEngine()
    sets = {"easy": EASY, "hard": HARD}
    metrics = measure(
        tmp_path,
        engine,
        sets,
        data={"eval": {"easy": "easy.jsonl", "hard": "hard.jsonl"}},
        evaluation={"samples_per_problem": K, "temperature": 0.8, "top_p": 0.7},
    )
    assert engine.asked == [SamplingSettings(0.8, 0.7, 12), SamplingSettings(0.0, 1.0, 12)]
    right = np.array([[sampling_seed(5, -1, prompt.uid, i) % 2 == 0 for i in range(K)] for prompt in EASY])
    assert 0 < right.mean() < 1
    assert metrics["eval/easy/sampled_accuracy"] == metrics["eval/easy/avg@3"] == pytest.approx(right.mean())
    assert metrics["eval/easy/cons@3"] == pytest.approx((right.sum(axis=1) >= 2).mean())
    assert metrics["eval/easy/pass@3"] == pytest.approx(right.any(axis=1).mean())
    assert metrics["eval/easy/greedy_accuracy"] == 1.0
    assert metrics["eval/hard/pass@3"] == metrics["eval/hard/greedy_accuracy"] == 0.0
    assert metrics["eval/sampled_accuracy"] == pytest.approx(right.sum() / (10 * K))  # over problems, not over sets
    assert metrics["eval/greedy_accuracy"] == 0.6
    assert metrics["eval/verifies_frac"] == 0.0
    for name, prompts in sets.items():
        table = read_table(tmp_path / "step_000020" / f"{name}.jsonl")
        assert [row["uid"] for row in table] == [prompt.uid for prompt in prompts]
        assert all(len(row["predictions"]) == K for row in table)
        assert len(read_table(tmp_path / "step_000020" / "greedy" / f"{name}.jsonl")) == len(prompts)
    assert [row["correct"] for row in read_table(tmp_path / "step_000020" / "easy.jsonl")] == right.tolist()


def test_each_set_is_judged_by_its_reward(tmp_path: Path) -> None:
    function = tmp_path / "custom.py"
    function.write_text("def is_8(response, ground_truth):\n    return float('8' in response)\n")
    config = RewardConfig(rule="custom", function=f"{function}:is_8")
    with closing(make_reward(config, max_response_tokens=12)) as reward:
        metrics = measure(
            *(tmp_path, FakeEngine(), {"easy": EASY, "hard": HARD}),
            others={"hard": reward},
            data={"eval": {"easy": "easy.jsonl", "hard": "hard.jsonl"}},
            evaluation={"samples_per_problem": K},
        )
    says_8 = {
        name: np.array([[sampling_seed(5, -1, prompt.uid, i) % 2 for i in range(K)] for prompt in prompts])
        for name, prompts in {"easy": EASY, "hard": HARD}.items()
    }
    assert metrics["eval/easy/sampled_accuracy"] == pytest.approx(1 - says_8["easy"].mean())
    assert metrics["eval/hard/sampled_accuracy"] == pytest.approx(says_8["hard"].mean())
    num_right = (1 - says_8["easy"]).sum() + says_8["hard"].sum()
    assert metrics["eval/sampled_accuracy"] == pytest.approx(num_right / (10 * K))


def test_one_sample_of_the_task(tmp_path: Path) -> None:
    engine = FakeEngine()
    metrics = measure(tmp_path, engine, {"held_out": EASY}, evaluation={"greedy": False})
    assert len(engine.asked) == 1
    assert not [name for name in metrics if "@" in name or "greedy" in name or name.count("/") > 1]
    assert {path.name for path in (tmp_path / "step_000020").iterdir()} == {"held_out.jsonl"}


def test_samples_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match="evaluation.samples_per_problem = 4: with evaluation.temperature = 0"):
        Config.model_validate({"evaluation": {"samples_per_problem": 4, "temperature": 0.0}})
