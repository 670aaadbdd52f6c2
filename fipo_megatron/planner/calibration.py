"""Two constants from a run that was made: how fast its policy computes, and how fast its engines decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.efficiency import Efficiencies, efficiency_fields
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.step_time import predict_step

PHASES = ("rollout", "old_logprobs", "train", "sync")
TRAINER_SHARES = ("matmul", "grouped_matmul", "attention", "head", "elementwise")
ENGINE_SHARES = ("prefill", "decode", "decode_matmul")
ENGINE_TIMES = ("decode_step_s",)
HALVINGS = 60  # of the interval in which the trainer's constant is looked for


@dataclass(frozen=True)
class Measured:
    """Medians over a run's steps after the first."""

    phases: dict[str, float]  # seconds
    generation_batches: float

    def acceptance_rate(self, config: Config) -> float:
        """Share of generated groups at which a step takes as many generation batches."""
        if not config.dynamic_sampling.enabled:
            return 1.0
        generated = config.dynamic_sampling.generation_prompts * self.generation_batches
        return min(1.0, config.rollout.prompts_per_step / generated)


def measured_by(rows: Sequence[Mapping[str, float]]) -> Measured:
    """What a run's metrics say, of its lines in metrics.jsonl.

    Raises:
        ValueError: no whole step after the first is recorded, or most were served from surplus groups alone.
    """
    names = [*(f"time/{name}_s" for name in PHASES), "rollout/generation_batches"]
    steps = [row for row in rows if row["step"] > 1 and row.keys() >= {*names}]
    if not steps:
        raise ValueError("metrics.jsonl has no step after the first, which is slow; run two or more")
    *seconds, batches = (float(np.median([row[name] for row in steps])) for name in names)
    if batches == 0:
        raise ValueError(
            "metrics.jsonl: most steps generated nothing, they trained on groups of earlier ones; give a run with "
            "dynamic_sampling.surplus=drop"
        )
    return Measured(dict(zip(PHASES, seconds, strict=True)), batches)


def calibrate(
    config: Config,
    shape: ModelShape,
    lengths: Lengths,
    gpu: Gpu,
    measured: Measured,
    efficiencies: Efficiencies | None = None,
) -> Efficiencies:
    """Efficiencies at which a run's phases come out as they were measured, its sync excepted.

    One constant divides all shares that the trainer computes with, so that old log-probs and updates together take
    their time; the other divides the engine's shares and multiplies the fixed time of its steps, so that the rollout
    does. What is not scaled, links, memory and calls, stays as it is in `efficiencies`.

    Raises:
        ValueError: calls and links alone take longer than was measured, or shares would be above 1: another device.
    """
    start, acceptance_rate = efficiencies or Efficiencies(), measured.acceptance_rate(config)

    def trainer_s(slowness: float) -> float:
        at = _scaled(start, TRAINER_SHARES, (), slowness)
        phases = predict_step(config, shape, lengths, gpu, at, acceptance_rate=acceptance_rate).phases
        return phases["old_logprobs"].expected + phases["train"].expected

    wanted = measured.phases["old_logprobs"] + measured.phases["train"]
    fastest = max(getattr(start, name) for name in TRAINER_SHARES)  # where a share is 1
    low, high = np.log(fastest), np.log(fastest) + 20.0
    if not trainer_s(float(np.exp(low))) < wanted < trainer_s(float(np.exp(high))):
        raise ValueError(
            f"the run's log-probs and updates took {wanted:.3g} s, which no share of {gpu.name}'s FLOP/s explains: "
            "name its device with --gpu, or lower --efficiency call_s"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if trainer_s(float(np.exp(middle))) < wanted else (low, middle)
    found = _scaled(start, TRAINER_SHARES, (), float(np.exp(low)))
    rollout = predict_step(config, shape, lengths, gpu, found, acceptance_rate=acceptance_rate).phases["rollout"]
    return _scaled(found, ENGINE_SHARES, ENGINE_TIMES, measured.phases["rollout"] / rollout.expected)


def _scaled(
    efficiencies: Efficiencies, shares: tuple[str, ...], times: tuple[str, ...], slowness: float
) -> Efficiencies:
    """Shares divided and times multiplied; a share stays at most 1."""
    values = {name: min(1.0, getattr(efficiencies, name) / slowness) for name in shares}
    return efficiencies.with_values(**values, **{name: getattr(efficiencies, name) * slowness for name in times})


def describe(efficiencies: Efficiencies) -> str:
    """The values that have no range, as `--efficiency` takes them."""
    names = [field.name for field in efficiency_fields() if field.name in efficiencies.given]
    return " ".join(f"{name}={getattr(efficiencies, name):.4g}" for name in names)
