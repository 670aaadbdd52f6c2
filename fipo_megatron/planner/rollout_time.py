"""How long engines take over a generation batch: until the last of them has ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.engine_model import EngineModel
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.lengths import GROUP_CORRELATION, Lengths
from fipo_megatron.planner.parameters import bytes_of_type

FOLLOWED_REQUESTS = 2048  # of all engines that may be the last to end: about 0.2 s of a processor


@dataclass(frozen=True)
class GenerationWork:
    """What keeps the engines until the last of them ends."""

    num_batches: float
    share: Lengths  # requests of that engine
    samples_per_prompt: int

    @classmethod
    def of_rollout(
        cls, config: Config, engine: EngineModel, lengths: Lengths, acceptance_rate: float, seed: int
    ) -> GenerationWork:
        """Of a step."""
        num_batches, num_prompts = generation_batches(config, acceptance_rate)
        samples = config.rollout.samples_per_prompt
        shares = fullest_shares(config, lengths, num_prompts, samples, seed)
        return cls(num_batches, last_share(config, engine, shares, samples), samples)

    @classmethod
    def of_evaluation(cls, config: Config, engine: EngineModel, lengths: Lengths, seed: int) -> GenerationWork:
        """Of an evaluation."""
        evaluation = config.evaluation
        num_problems = max(1, len(config.data.eval)) * evaluation.num_problems
        samples = evaluation.samples_per_problem + evaluation.greedy
        shares = fullest_shares(config, lengths, num_problems, samples, seed)
        return cls(1.0, last_share(config, engine, shares, samples), samples)

    def seconds(self, config: Config, engine: EngineModel) -> float:
        """At an engine's efficiencies."""
        return self.num_batches * share_s(config, engine, self.share, self.samples_per_prompt)


def generation_batches(config: Config, acceptance_rate: float) -> tuple[float, int]:
    """Generation batches of a step, and the prompts of each. Groups that are kept for the next step count there, so
    that the number is then a mean; those that are dropped are generated for nothing."""
    rollout, dynamic = config.rollout, config.dynamic_sampling
    if not dynamic.enabled:
        return 1.0, rollout.prompts_per_step
    num_batches = rollout.prompts_per_step / (dynamic.generation_prompts * acceptance_rate)
    if dynamic.surplus == "drop":
        num_batches = math.ceil(num_batches - 1e-9)
    return num_batches, dynamic.generation_prompts


def make_engine(config: Config, shape: ModelShape, gpu: Gpu, efficiencies: Efficiencies) -> EngineModel:
    """One of the run's engines."""
    rollout, width = config.rollout, bytes_of_type(config.model.dtype)
    return EngineModel(shape, gpu, efficiencies, rollout.tensor, rollout.pipeline, rollout.expert_parallel, width)


def kv_capacity(config: Config, engine: EngineModel) -> int:
    """Tokens whose keys and values an engine holds.

    Raises:
        ValueError: the weights leave no room.
    """
    if config.platform == "cpu":
        return int((config.rollout.kv_cache_gib << 30) / engine.kv_bytes_per_token)
    return engine.kv_capacity_tokens(config.rollout.gpu_memory_utilization)


def fullest_shares(
    config: Config,
    lengths: Lengths,
    num_prompts: int,
    samples_per_prompt: int,
    seed: int,
    num_requests: int = FOLLOWED_REQUESTS,
) -> list[Lengths]:
    """The requests of the engines that have most to do, the fullest first, up to `num_requests` together, but at least
    one engine's: prompts are dealt out in turn, all samples of a prompt to one engine (rollout/replicas.py).

    What an engine has to do is counted by the tokens that its tokens attend to: they fill its cache, or are read. One
    engine has all requests, so that it does not matter which of them are alike.
    """
    replicas = config.rollout.replicas
    if replicas == 1:
        return [lengths.draw(num_prompts * samples_per_prompt, seed)]
    drawn = lengths.draw_groups(num_prompts, samples_per_prompt, seed, GROUP_CORRELATION)
    engine_of = np.arange(num_prompts).repeat(samples_per_prompt) % replicas
    work = np.bincount(engine_of, drawn.response * (drawn.prompt + drawn.response / 2), replicas)
    num_shares = max(num_requests * replicas // (num_prompts * samples_per_prompt), 1)
    fullest = np.argsort(-work, kind="stable")[: min(num_shares, num_prompts)]
    return [Lengths(drawn.prompt[engine_of == engine], drawn.response[engine_of == engine]) for engine in fullest]


def last_share(config: Config, engine: EngineModel, shares: Sequence[Lengths], samples_per_prompt: int) -> Lengths:
    """The requests of the engine that ends last."""
    return max(shares, key=lambda share: share_s(config, engine, share, samples_per_prompt))


def share_s(config: Config, engine: EngineModel, share: Lengths, samples_per_prompt: int) -> float:
    """Until an engine has finished its share, followed request by request."""
    return engine.generate(
        share.prompt,
        share.response,
        max_concurrent=config.rollout.max_concurrent_sequences,
        kv_capacity=kv_capacity(config, engine),
        samples_per_prompt=samples_per_prompt,
    ).seconds
