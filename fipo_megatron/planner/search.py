"""The fastest layouts that fit: of trainer, engines and placement on a number of GPUs.

Layouts of the policy and of the engines are judged apart: the time of a step is the sum of both. Only the few that are
best so are predicted as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.parallel.plan import PackingPlan, microbatch_tokens
from fipo_megatron.planner.activations import LayerKind
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.memory import MemoryInputs
from fipo_megatron.planner.pass_time import Microbatches, PassModel, packing_units
from fipo_megatron.planner.report import Plan, engine_misfits, make_plan
from fipo_megatron.planner.rollout_time import fullest_shares, generation_batches, make_engine, share_s
from fipo_megatron.planner.step_time import predict_step

MAX_CONTEXT = 16
MAX_PIPELINE = 16
MAX_CHUNKS = 4  # model chunks of a stage under the interleaved schedule
TRAINER_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the GPUs, where engines have their own
NUM_PREDICTED = 6  # candidates whose whole step is predicted

Settings = dict[str, Any]  # by the path of a key, such as parallel.tensor


@dataclass(frozen=True)
class Inputs:
    """What a search is made for."""

    config: Config
    shape: ModelShape
    origin: str
    gpu: Gpu
    kind: LayerKind
    memory: MemoryInputs
    lengths: Lengths
    efficiencies: Efficiencies
    is_allowed: Callable[[Config, ModelShape], bool]  # by the checks of a run
    acceptance_rate: float  # of generated groups, that training keeps
    headroom: float = 0.0  # share of a device that a layout leaves free


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, and the settings that make it of the configuration."""

    settings: Settings
    plan: Plan


@dataclass(frozen=True)
class SearchResult:
    """The best first."""

    proposals: list[Proposal]
    num_allowed: int  # layouts of the policy that the checks allow
    num_fitting: int
    nearest: Plan | None  # of those that don't fit, where none does, the one that lacks least


def search(inputs: Inputs, num_gpus: int, num_best: int, note: Callable[[str], None]) -> SearchResult:
    """The fastest layouts on `num_gpus` GPUs. `note` is told how far it is.

    Raises:
        ValueError: on so many no engine has room, or no layout of the policy is allowed; a sample beyond the limits.
    """
    inputs.lengths.check_limits(inputs.config)
    timer = _Timer(inputs)
    scored: list[tuple[float, Settings, Config]] = []
    nearest: Plan | None = None
    num_allowed = num_fitting = 0
    placements = list(_placements(inputs.config, inputs.gpu, num_gpus))
    with_engines = [(placement, engines) for placement in placements if (engines := _engines(inputs, placement))]
    for placement, engines in with_engines:
        rollout_s, engine = min(((timer.rollout_s(config), settings) for settings, config in engines), key=_first)
        fitting: list[tuple[Settings, Config]] = []
        for settings, config in _policies(inputs, placement | engine):
            num_allowed += 1
            if _without_recompute(settings) in (kept for kept, _ in fitting):
                continue  # what is not computed again is faster
            plan = _plan(inputs, config)
            if plan.misfits:
                nearest = min((plan, nearest or plan), key=_lack)
                continue
            fitting.append((settings, config))
        note(f"{_describe(placement)}: {num_allowed} layouts seen, {len(fitting)} of them fit")
        num_fitting += len(fitting)
        scored += [(rollout_s + timer.policy_s(config), settings, config) for settings, config in fitting]
        note(f"{_describe(placement)}: {len(fitting)} timed")
    if not num_allowed:
        raise ValueError(f"--gpus {num_gpus}: {_cause(inputs, placements, with_engines)}")
    scored.sort(key=_first)
    proposals = [_propose(inputs, settings, config) for _, settings, config in scored[:NUM_PREDICTED]]
    proposals.sort(key=lambda proposal: proposal.plan.time.step_s.expected if proposal.plan.time else 0.0)
    return SearchResult(proposals[:num_best], num_allowed, num_fitting, None if proposals else nearest)


def _cause(inputs: Inputs, placements: list[Settings], with_engines: list[Any]) -> str:
    """Why there is nothing to choose from, and what helps."""
    if not placements:
        return "on a CPU, and with rollout.engine=hf, engines have devices of their own; give 2 or more"
    if not with_engines:
        return (
            "no engine has room for the model: one takes a power of 2 of GPUs, at most a node, that divides those for "
            "engines and the attention heads; give a number with a larger one, or raise rollout.gpu_memory_utilization"
        )
    worlds = ", ".join(str(placement["world"]) for placement, _ in with_engines)
    return (
        f"no layout of the policy on {worlds} of them divides the model's sizes and the samples of a mini-batch, and "
        "passes the checks of a run; give another number, such as a power of 2"
    )


def _first(pair: tuple[Any, ...]) -> float:
    return float(pair[0])


def _lack(plan: Plan) -> float:
    """Bytes that are missing most."""
    return max(misfit.needed - misfit.available for misfit in plan.misfits)


def _plan(inputs: Inputs, config: Config) -> Plan:
    return make_plan(config, inputs.shape, inputs.origin, inputs.gpu, inputs.kind, inputs.memory, inputs.headroom)


def _propose(inputs: Inputs, settings: Settings, config: Config) -> Proposal:
    plan = _plan(inputs, config)
    arguments = (config, inputs.shape, inputs.lengths, inputs.gpu, inputs.efficiencies)
    time = predict_step(*arguments, acceptance_rate=inputs.acceptance_rate)
    changed = {key: value for key, value in settings.items() if value != _value(inputs.config, key)}
    return Proposal(changed, replace(plan, time=time))


# ---------------------------------------------------------------- what there is to choose from


def _placements(config: Config, gpu: Gpu, num_gpus: int) -> Iterator[Settings]:
    """Who has which GPUs. `world` and `engines` are numbers of GPUs, the rest are settings."""
    if config.rollout.engine != "hf" and config.platform != "cpu":
        yield {"world": num_gpus, "engines": num_gpus, "placement.mode": "colocated", "trainer.offload": True}
    unit = gpu.gpus_per_node if num_gpus >= 2 * gpu.gpus_per_node else 1
    seen = set()
    for share in TRAINER_SHARES:
        world = round(num_gpus * share / unit) * unit
        if 0 < world < num_gpus and world not in seen:
            seen.add(world)
            mode = {"placement.mode": "disaggregated", "trainer.offload": False}
            yield {"world": world, "engines": num_gpus - world, **mode}


def _engines(inputs: Inputs, placement: Settings) -> list[tuple[Settings, Config]]:
    """Engines of one node each, that have room."""
    found = []
    num_gpus, mode = placement["engines"], placement["placement.mode"]
    sizes = [1] if inputs.config.rollout.engine == "hf" else _powers(min(inputs.gpu.gpus_per_node, num_gpus))
    for tensor in sizes:
        if num_gpus % tensor or inputs.shape.num_attention_heads % tensor:
            continue
        settings = {"rollout.tensor": tensor, "rollout.pipeline": 1, "rollout.replicas": num_gpus // tensor}
        config = _with_settings(inputs.config, settings | {"placement.mode": mode})
        if not engine_misfits(config, inputs.shape, inputs.gpu):
            found.append((settings, config))
    return found


def _policies(inputs: Inputs, chosen: Settings) -> Iterator[tuple[Settings, Config]]:
    """Layouts of the policy that the checks allow; those that compute nothing again come before those that do."""
    chosen = dict(chosen)
    world = chosen.pop("world")
    chosen.pop("engines")
    for recompute in ("none", "full"):
        for parallel in _layouts(inputs, world):
            for factor in (1, 2):
                settings = chosen | {f"parallel.{key}": value for key, value in parallel.items()}
                settings["trainer.recompute"] = recompute
                settings["trainer.microbatch_tokens"] = None
                config = _with_settings(inputs.config, settings)
                if factor > 1:
                    settings["trainer.microbatch_tokens"] = factor * microbatch_tokens(config)
                    config = _with_settings(inputs.config, settings)
                if inputs.is_allowed(config, inputs.shape):
                    yield settings, config


def _layouts(inputs: Inputs, world: int) -> Iterator[Settings]:
    shape = inputs.shape
    samples = inputs.config.trainer.mini_batch_prompts * inputs.config.rollout.samples_per_prompt
    for tensor in _powers(min(inputs.gpu.gpus_per_node, world)):
        for context in _powers(min(MAX_CONTEXT, world // tensor)):
            for pipeline in _divisors(shape.num_layers, min(MAX_PIPELINE, world // tensor // context)):
                ranks, rest = divmod(world, tensor * context * pipeline)
                if rest or ranks == 0 or samples % ranks:
                    continue
                layout = {
                    "tensor": tensor,
                    "sequence_parallel": tensor > 1,
                    "context": context,
                    "pipeline": pipeline,
                    "data": ranks,
                    "distributed_optimizer": True,
                }
                for chunks in _chunks(shape, pipeline):
                    for experts in _experts(shape, tensor, tensor * context * ranks):
                        yield layout | {"virtual_pipeline": chunks} | experts


def _chunks(shape: ModelShape, pipeline: int) -> list[int | None]:
    if pipeline == 1:
        return [None]
    return [None, *(n for n in range(2, MAX_CHUNKS + 1) if shape.num_layers % (pipeline * n) == 0)]


def _experts(shape: ModelShape, tensor: int, stage_ranks: int) -> Iterator[Settings]:
    if not shape.num_experts:
        yield {"expert": 1, "expert_tensor": 1}
        return
    yield {"expert": 1, "expert_tensor": tensor}
    for expert in _powers(min(shape.num_experts, stage_ranks))[1:]:
        yield {"expert": expert, "expert_tensor": 1}


def _with_settings(config: Config, settings: Settings) -> Config:
    """The configuration with other values, which need no validation by themselves."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if name:
            sections.setdefault(section, {})[name] = value
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _without_recompute(settings: Settings) -> Settings:
    return settings | {"trainer.recompute": "none"}


def _powers(limit: int) -> list[int]:
    """Powers of 2 up to a limit."""
    return [1 << n for n in range(limit.bit_length()) if 1 << n <= limit]


def _divisors(number: int, limit: int) -> list[int]:
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


def _describe(placement: Settings) -> str:
    if placement["placement.mode"] == "colocated":
        return f"{placement['world']} GPUs shared"
    return f"{placement['world']} GPUs for the policy, {placement['engines']} for engines"


# ---------------------------------------------------------------- how long it takes


class _Timer:
    """Seconds of a step's parts, of which like ones are computed once."""

    def __init__(self, inputs: Inputs) -> None:
        config = inputs.config
        self.inputs = inputs
        self.num_updates = config.rollout.prompts_per_step // config.trainer.mini_batch_prompts
        self.samples = config.trainer.mini_batch_prompts * config.rollout.samples_per_prompt
        self.drawn = inputs.lengths.draw(self.samples, 0)
        self.rows = float(self.drawn.response.sum())

    def rollout_s(self, config: Config) -> float:
        """Of the engine that has most to do."""
        inputs, samples = self.inputs, config.rollout.samples_per_prompt
        number, prompts = generation_batches(config, inputs.acceptance_rate)
        engine = make_engine(config, inputs.shape, inputs.gpu, inputs.efficiencies)
        share, *_ = fullest_shares(config, inputs.lengths, prompts, samples, seed=1, num_requests=1)
        return number * share_s(config, engine, share, samples)

    def policy_s(self, config: Config) -> float:
        """Of the updates, and of the two passes of log-probs around them, as if all microbatches were alike: each has
        the mean of tokens, pairs and rows, a pipeline waits for its first and last one."""
        inputs, parallel = self.inputs, config.parallel
        passes = PassModel(config, inputs.shape, inputs.gpu, inputs.efficiencies)
        units, chunks = packing_units(config), parallel.virtual_pipeline or 1
        tokens = units.sequence_lens(self.drawn.sequence).sum() / parallel.data
        number = max(int(np.ceil(tokens / units.capacity(microbatch_tokens(config)))), 1)
        if chunks > 1:
            number = -(-number // parallel.pipeline) * parallel.pipeline
        positions = self.drawn.sequence - 1.0
        work = np.array([tokens, (positions * (positions + 1) / 2).sum() / parallel.data, self.rows / parallel.data])
        capacity = units.capacity(microbatch_tokens(config))
        plan = PackingPlan((((),),), np.ones((1, 1)), int(tokens), int(tokens), capacity, number)
        tokens_of, pairs_of, rows_of = (work / number).reshape(3, 1, 1)
        forward, backward = passes.times(Microbatches(tokens_of, pairs_of, rows_of, plan))
        slots = number + (parallel.pipeline - 1) / chunks
        forward_s, backward_s = (slots * float(of.sum((1, 2, 3)).max()) for of in (forward, backward))
        return self.num_updates * (3 * forward_s + backward_s + sum(passes.update_s()))
