"""A run's evaluation: every held-out problem sampled k times and once greedily, judged, recorded, and summed up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from fipo_megatron.config.schema import Config
from fipo_megatron.evaluation.protocol import (
    ProblemResult,
    accuracy_metrics,
    judge_problems,
    run_metrics,
    write_results,
)
from fipo_megatron.reward.judge import UNREADABLE, Reward
from fipo_megatron.rollout.client import RolloutClient
from fipo_megatron.rollout.collect import EVALUATION_BATCH, make_requests
from fipo_megatron.rollout.stream import gather_responses
from fipo_megatron.types import Decode, Prompt, SamplingSettings


class HeldOutEvaluation:
    """Measures the engine's policy on named sets of problems, as the configuration says.

    Every evaluation uses the same seeds: two of them differ by the policy, not by luck.
    """

    def __init__(
        self,
        config: Config,
        sets: Mapping[str, Sequence[Prompt]],
        rewards: Mapping[str, Reward],
        decode: Decode,
        folder: Path,
    ) -> None:
        """`sets` and `rewards` are by name of the set."""
        self._config = config
        self._sets = sets
        self._rewards = rewards
        self._decode = decode
        self._folder = folder

    async def measure(self, engine: RolloutClient, step: int) -> dict[str, float]:
        """Metrics over all problems under `eval/`, and of each set that `data.eval` names under `eval/<set>/`.

        The judged samples go to `step_<number>/<set>.jsonl`, the greedy ones to `step_<number>/greedy/<set>.jsonl`.
        """
        settings, limit = self._config.evaluation, self._config.rollout.max_response_tokens
        folder = self._folder / f"step_{step:06d}"
        sampled = await self._sample(
            engine, SamplingSettings(settings.temperature, settings.top_p, limit), settings.samples_per_problem, folder
        )
        metrics = {
            prefix + name: value
            for prefix, results in sampled.items()
            for name, value in run_metrics(results, UNREADABLE, self._config.seed).items()
        }
        if settings.greedy:
            greedy = await self._sample(engine, SamplingSettings(0.0, 1.0, limit), 1, folder / "greedy")
            metrics |= {
                f"{prefix}greedy_{name}": value
                for prefix, results in greedy.items()
                for name, value in accuracy_metrics(results).items()
            }
        return metrics

    async def _sample(
        self, engine: RolloutClient, sampling: SamplingSettings, samples_per_problem: int, folder: Path
    ) -> dict[str, list[ProblemResult]]:
        """Judged samples by the prefix of their metrics: of all problems, and of each named set."""
        prompts = [prompt for prompts in self._sets.values() for prompt in prompts]
        requests = make_requests(prompts, samples_per_problem, self._config.seed, EVALUATION_BATCH)
        generations = await gather_responses(engine.generate(requests, sampling), len(requests))
        results: list[ProblemResult] = []
        by_prefix = {"eval/": results}
        for name, set_prompts in self._sets.items():
            start, num_samples = len(results) * samples_per_problem, len(set_prompts) * samples_per_problem
            judge = self._rewards[name].with_limit(num_samples)
            # In a thread, so that an interrupt is heard while answers are judged.
            of_set = await asyncio.to_thread(
                judge_problems, set_prompts, generations[start : start + num_samples], judge, self._decode
            )
            write_results(folder / f"{name}.jsonl", of_set)
            if self._config.data.eval:
                by_prefix[f"eval/{name}/"] = of_set
            results += of_set
        return by_prefix
