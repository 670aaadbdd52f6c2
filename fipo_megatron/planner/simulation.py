"""A mini-batch on all ranks of the trainer: the real plan of its microbatches, and what each stage does when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fipo_megatron.parallel.plan import PackingPlan
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.pass_time import Microbatches, PassModel, plan_samples
from fipo_megatron.planner.pipeline import PipelineTrace, simulate_pipeline


@dataclass(frozen=True)
class PassTrace:
    """A mini-batch's way through the trainer's ranks. Tensor- and context-parallel ranks do the same."""

    plan: PackingPlan
    planning_s: float  # of this processor, that the real planning took; every rank does it
    pipelines: tuple[PipelineTrace, ...]  # of each data-parallel rank

    @cached_property
    def rank_s(self) -> np.ndarray:
        """Until each data-parallel rank is through, float64 [data]."""
        return np.array([pipeline.seconds for pipeline in self.pipelines])

    @property
    def seconds(self) -> float:
        """Until all are: they meet to sum gradients, or to hand out log-probs."""
        return float(self.rank_s.max())

    @cached_property
    def busy_s(self) -> np.ndarray:
        """Of each stage, on average over data-parallel ranks, float64 [stages]."""
        return np.mean([pipeline.busy_s for pipeline in self.pipelines], axis=0)

    @property
    def bubble(self) -> np.ndarray:
        """Share of its pipeline's time in which a stage waits, on average over data-parallel ranks, [stages]."""
        return 1 - self.busy_s / self.rank_s.mean()

    @property
    def waiting(self) -> float:
        """Share of the pass in which data-parallel ranks wait for the slowest, on average."""
        return 1 - float(self.rank_s.mean()) / self.seconds


def simulate_pass(model: PassModel, lengths: Lengths, samples: Sequence[int], *, trains: bool) -> PassTrace:
    """`samples` are indices into `lengths`: of a mini-batch, or for log-probs all; `trains`: with backward passes.

    Ranks that share out experts meet in every layer: each microbatch then takes on all data-parallel ranks what the
    dearest in its place takes.
    """
    start = time.thread_time()
    plan = plan_samples(model.config, model.shape, lengths, samples)
    planning_s = time.thread_time() - start
    forward, backward = model.times(Microbatches.of_plan(model.config, lengths, plan))
    if model.config.parallel.expert > 1:
        forward, backward = forward.max(2, keepdims=True), backward.max(2, keepdims=True)
    num_distinct = forward.shape[2]
    pipelines = [
        simulate_pipeline(forward[:, :, rank], backward[:, :, rank] if trains else None) for rank in range(num_distinct)
    ]
    return PassTrace(plan, planning_s, tuple(pipelines * (model.config.parallel.data // num_distinct)))
