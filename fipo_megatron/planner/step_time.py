"""How long a step takes, by the phases that the loop times (trainer/loop.py), with a range, and what a run costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.communication import (
    Kind,
    pass_traffic,
    replicas,
    stage_weights,
    update_traffic,
)
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.flops import training_flops
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.parameters import MAIN_BYTES, MOMENT_BYTES, bytes_of_type
from fipo_megatron.planner.pass_time import Microbatches, PassModel, pack
from fipo_megatron.planner.rollout_time import GenerationWork, generation_batches, make_engine
from fipo_megatron.planner.sync_time import sync_s, sync_traffic

ACCEPTANCE_RATE = 0.5  # of generated groups, with dynamic sampling: neither all right nor all wrong

TRAIN_PARTS = ("passes", "gradients", "optimizer", "new_logprobs", "reload", "calls")


@dataclass(frozen=True)
class Estimate:
    """Expected, and with all efficiencies at the fast or the slow end of what is usual."""

    low: float
    expected: float
    high: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Of a function of it; one that falls changes the ends."""
        low, expected, high = (function(value) for value in (self.low, self.expected, self.high))
        return Estimate(min(low, high), expected, max(low, high))


@dataclass(frozen=True)
class StepTime:
    """A step's seconds, and what follows from them."""

    phases: dict[str, Estimate]  # rollout, old_logprobs, train, sync: one after the other
    parts: dict[str, Estimate]  # what `train` consists of
    eval_s: Estimate  # of an evaluation, over the steps between two; not in a step's time
    bubble: list[float]  # of each pipeline stage: the share of updates' passes in which it waits
    communication: dict[Kind, float]  # bytes that the busiest rank sends in a step; sync: all ranks together
    num_microbatches: int  # of a rank, in all updates
    imbalance: float  # how much longer than the mean the slowest data-parallel rank computes, in updates
    num_generated: float  # samples; dynamic sampling drops some
    num_trained: int
    trained_tokens: float
    num_gpus: int
    steps: int
    model_flops: float  # forward and backward passes of the samples that are trained on, nothing twice
    peak_flops: float  # of the policy's GPUs, per second
    price_per_hour: float  # of all GPUs
    assumptions: dict[str, float] = field(default_factory=dict)  # inputs that neither config nor lengths have

    @property
    def step_s(self) -> Estimate:
        """Of the synchronous loop: the sum of the phases."""
        total = Estimate(0.0, 0.0, 0.0)
        for phase in self.phases.values():
            total = total + phase
        return total

    @property
    def one_step_off_s(self) -> Estimate:
        """Of a loop that samples the next batch meanwhile, on the engines' own GPUs. This project's does not."""
        rollout = self.phases["rollout"]
        low, expected, high = (
            max(getattr(rollout, end), getattr(self.step_s, end) - getattr(rollout, end))
            for end in ("low", "expected", "high")
        )
        return Estimate(low, expected, high)

    @property
    def tokens_per_gpu_s(self) -> Estimate:
        """Trained tokens, prompts included, a second and GPU of all."""
        return self.step_s.map(lambda s: self.trained_tokens / s / self.num_gpus)

    @property
    def mfu(self) -> Estimate:
        """Model FLOPs utilisation of the updates: model_flops / (their seconds * peak_flops)."""
        updates = self.parts["passes"] + self.parts["gradients"] + self.parts["optimizer"]
        return updates.map(lambda s: self.model_flops / (s * self.peak_flops))

    @property
    def run_hours(self) -> Estimate:
        """Of `trainer.steps` steps with their evaluations, without starts and checkpoints."""
        return (self.step_s + self.eval_s).map(lambda s: s * self.steps / 3600)

    @property
    def gpu_hours(self) -> Estimate:
        """Of the run, all GPUs."""
        return self.run_hours.map(lambda hours: hours * self.num_gpus)

    @property
    def cost(self) -> Estimate:
        """Of the run, in the currency of `Gpu.price_per_hour`."""
        return self.run_hours.map(lambda hours: hours * self.price_per_hour)


def predict_step(
    config: Config,
    shape: ModelShape,
    lengths: Lengths,
    gpu: Gpu,
    efficiencies: Efficiencies | None = None,
    *,
    acceptance_rate: float = ACCEPTANCE_RATE,
    reward_s: float = 0.0,
    seed: int = 0,
) -> StepTime:
    """A step of a run whose samples, trained on or dropped, have the distribution of `lengths`.

    `acceptance_rate` is the share of generated groups that dynamic sampling keeps; `reward_s` what judging and other
    work of the driver adds to a rollout.

    Raises:
        ValueError: an input out of its range, a sample beyond the run's limits or its microbatches, or an engine
            without room.
    """
    lengths.check_limits(config)
    if not 0 < acceptance_rate <= 1:
        raise ValueError(f"acceptance_rate = {acceptance_rate:g}: must be above 0, at most 1")
    efficiencies = efficiencies or Efficiencies()
    rollout, world_size = config.rollout, config.parallel.world_size
    num_trained = rollout.prompts_per_step * rollout.samples_per_prompt
    batch = Batch.draw(config, shape, lengths, num_trained, seed)
    engine = make_engine(config, shape, gpu, efficiencies)
    rollout_work = GenerationWork.of_rollout(config, engine, lengths, acceptance_rate, seed + 1)
    evaluation = GenerationWork.of_evaluation(config, engine, lengths, seed + 1)
    given = _Given(config, shape, gpu, batch, rollout_work, evaluation, reward_s)
    fast, expected, slow = (_Prediction(given, at) for at in (efficiencies.fast(), efficiencies, efficiencies.slow()))
    parts = {
        name: Estimate(fast.seconds[name], expected.seconds[name], slow.seconds[name]) for name in expected.seconds
    }
    train = {name: parts[name] for name in TRAIN_PARTS}
    own_gpus = rollout.tensor * rollout.pipeline * rollout.replicas if config.placement.mode != "colocated" else 0
    return StepTime(
        phases={
            "rollout": parts["rollout"],
            "old_logprobs": parts["old_logprobs"],
            "train": sum(train.values(), Estimate(0.0, 0.0, 0.0)),
            "sync": parts["sync"],
        },
        parts=train,
        eval_s=parts["eval"],
        bubble=expected.bubble(),
        communication=step_communication(config, shape, batch, efficiencies),
        num_microbatches=sum(update.plan.num_microbatches for update in batch.updates),
        imbalance=batch.imbalance(config),
        num_generated=math.prod(generation_batches(config, acceptance_rate)) * rollout.samples_per_prompt,
        num_trained=num_trained,
        trained_tokens=float(batch.lengths.sequence.sum()),
        num_gpus=world_size + own_gpus,
        steps=config.trainer.steps,
        model_flops=training_flops(shape, batch.lengths.sequence - 1, int(batch.lengths.response.sum())),
        peak_flops=gpu.flops(bytes_of_type(config.model.dtype)) * world_size,
        price_per_hour=gpu.price_per_hour * (world_size + own_gpus),
        assumptions={"acceptance_rate": acceptance_rate, "reward_s": reward_s},
    )


@dataclass(frozen=True)
class Batch:
    """Samples of one step, and their microbatches."""

    lengths: Lengths
    whole: Microbatches  # of the log-probs' passes
    updates: list[Microbatches]

    @classmethod
    def draw(cls, config: Config, shape: ModelShape, lengths: Lengths, num_samples: int, seed: int) -> Batch:
        """Samples of a distribution, cut into the run's mini-batches."""
        drawn = lengths.draw(num_samples, seed)
        size = config.trainer.mini_batch_prompts * config.rollout.samples_per_prompt
        updates = [
            pack(config, shape, drawn, range(start, min(start + size, num_samples)))
            for start in range(0, num_samples, size)
        ]
        return cls(drawn, pack(config, shape, drawn, range(num_samples)), updates)

    def imbalance(self, config: Config) -> float:
        """Of the updates, on average: how much longer than the mean the slowest data-parallel rank computes."""
        plans = [update.plan for update in self.updates]
        meets_often = config.parallel.expert > 1  # in each microbatch
        return float(np.mean([plan.synchronous_imbalance if meets_often else plan.imbalance for plan in plans]))


def step_communication(
    config: Config, shape: ModelShape, batch: Batch, efficiencies: Efficiencies
) -> dict[Kind, float]:
    """Bytes that the busiest rank sends in a step, by kind: two passes of log-probs, the updates. Of the sync all that
    ranks send or write."""
    recompute = config.trainer.recompute == "full"
    by_stage: list[dict[Kind, float]] = []
    for stage in range(config.parallel.pipeline):
        sent: dict[Kind, float] = {"dp": len(batch.updates) * update_traffic(config, shape, stage)}
        for held, passes, trains in [(batch.whole, 2, False), *((update, 1, True) for update in batch.updates)]:
            busiest = int(held.tokens.sum(1).argmax())
            tokens, rows = float(held.tokens[busiest].sum()), float(held.rows[busiest].sum())
            traffic = pass_traffic(config, shape, stage, tokens, rows)
            for kind in ("tp", "pp", "cp", "ep"):
                forward = passes + (trains and recompute and kind != "pp")
                amount = forward * traffic.forward.get(kind, 0.0) + trains * traffic.backward.get(kind, 0.0)
                sent[kind] = sent.get(kind, 0.0) + amount
        by_stage.append(sent)
    busiest_of = {kind: max(sent[kind] for sent in by_stage) for kind in by_stage[0]}
    return busiest_of | {"sync": sync_traffic(config, shape, efficiencies).total}


class _Given(NamedTuple):
    config: Config
    shape: ModelShape
    gpu: Gpu
    batch: Batch
    rollout: GenerationWork
    evaluation: GenerationWork
    reward_s: float


class _Prediction:
    """All parts of a step at one set of efficiencies."""

    def __init__(self, given: _Given, efficiencies: Efficiencies) -> None:
        self.given, self.efficiencies = given, efficiencies
        self.passes = PassModel(given.config, given.shape, given.gpu, efficiencies)
        self.updates = [self.passes.training_pass(update) for update in given.batch.updates]
        self.seconds = self._seconds()

    def _seconds(self) -> dict[str, float]:
        given, config, call_s = self.given, self.given.config, self.efficiencies.call_s
        num_updates = len(given.batch.updates)
        gradients, optimizer = self.passes.update_s()
        logprobs = self.passes.forward_pass(given.batch.whole).seconds
        num_old = 2 if config.algorithm.reference_kl_coef > 0 else 1  # the reference policy's as well
        weights, state = offloaded_s(config, given.shape, given.gpu, self.efficiencies)
        engine = make_engine(config, given.shape, given.gpu, self.efficiencies)
        return {
            "rollout": given.rollout.seconds(config, engine) + given.reward_s + weights,
            "old_logprobs": num_old * (logprobs + call_s) + weights,
            "passes": sum(update.seconds for update in self.updates),
            "gradients": num_updates * gradients,
            "optimizer": num_updates * optimizer,
            "new_logprobs": logprobs,
            "reload": state,
            "calls": (num_updates + 1) * call_s,
            "sync": sync_s(config, given.shape, given.gpu, self.efficiencies) + 2 * weights + state,
            "eval": given.evaluation.seconds(config, engine) / config.evaluation.every_steps,
        }

    def bubble(self) -> list[float]:
        """Over all updates, of each stage."""
        total = sum(update.seconds for update in self.updates)
        busy = np.sum([update.busy_s for update in self.updates], axis=0)
        return [float(share) for share in 1 - busy / total]


def offloaded_s(config: Config, shape: ModelShape, gpu: Gpu, efficiencies: Efficiencies) -> tuple[float, float]:
    """Copies of one rank's weights, and of its optimizer's state, one way, with `trainer.offload`.

    A sync takes both away and brings the weights back; a rollout takes those away, log-probs bring them back, and
    an update the state (model/host_offload.py).
    """
    if not config.trainer.offload:
        return 0.0, 0.0
    width = bytes_of_type(config.model.dtype)
    dense, experts = replicas(config.parallel) if config.parallel.distributed_optimizer else (1, 1)
    held = [stage_weights(shape, config.parallel, stage) for stage in range(config.parallel.pipeline)]
    weights = max(of_stage.dense + of_stage.experts for of_stage in held) * width
    share = max(of_stage.dense / dense + of_stage.experts / experts for of_stage in held)
    state = share * (MOMENT_BYTES + (MAIN_BYTES if width == 2 else 0))
    link = gpu.host_bandwidth * efficiencies.host_link
    return weights / link, state / link
