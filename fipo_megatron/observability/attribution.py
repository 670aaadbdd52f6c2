"""Where the time of a profiled run went: pure functions of the spans that its processes have recorded."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fipo_megatron.observability.timers import STEP, Span

TRAINING, FORWARD = "training pass", "forward pass"  # of a mini-batch through the pipeline, with and without backward
COMPUTE = ("forward", "backward")  # of one microbatch


class Workload(NamedTuple):
    """The samples that one call of the policy computes with."""

    call: str
    start: int  # as a Span's
    lengths: np.ndarray  # tokens of each sample, prompt and response
    num_response_tokens: int  # in all


@dataclass(frozen=True)
class RankProfile:
    """What a rank of the policy has recorded."""

    rank: int
    stage: int  # of the pipeline
    data: int  # which share of the batch, of those that data and context parallelism make
    pipeline: int  # the first rank of its pipeline: ranks with the same send each other activations
    host: str
    device: str
    dtype: str  # of the model, in which the device computes
    spans: list[Span]
    peak_bytes: dict[str, int]  # by call: the most memory of a device, on a CPU of the process
    workloads: list[Workload]
    span_cost_s: float  # what it takes to record one span
    call_cost_s: float  # and to measure the memory of a call
    matmul_flops: float  # operations per second of a large matrix product, all ranks at once
    pairs: list[tuple[float, float]]  # seconds of one gradient with recording, and without, where that was asked for


class StepTime(NamedTuple):
    """One step of a run, as its driver saw it."""

    step: int
    start: int
    end: int
    phases: dict[str, float]  # seconds, in the order in which they began

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9

    @property
    def unattributed_s(self) -> float:
        """What no phase has."""
        return self.seconds - sum(self.phases.values())


def attribute_steps(driver: Sequence[Span]) -> list[StepTime]:
    """The steps of a run from its beginning, by the driver's spans: phases, and STEP for each step from 0 on."""
    phases = sorted((span for span in driver if span.name != STEP), key=lambda span: span.start)
    steps = []
    for number, step in enumerate(span for span in driver if span.name == STEP):
        seconds: dict[str, float] = defaultdict(float)
        for span in phases:
            inside = min(span.end, step.end) - max(span.start, step.start)
            if inside > 0:
                seconds[span.name] += inside / 1e9
        steps.append(StepTime(number, step.start, step.end, dict(seconds)))
    return steps


def attributed_frac(steps: Sequence[StepTime]) -> float:
    """Share of the steps' time that phases have."""
    return 1 - sum(step.unattributed_s for step in steps) / sum(step.seconds for step in steps)


def inside_steps(spans: Iterable[Span], steps: Sequence[StepTime]) -> list[Span]:
    """The spans that began in one of the steps."""
    return [span for span in spans if any(step.start <= span.start < step.end for step in steps)]


class Pass(NamedTuple):
    """One pass of a mini-batch on one rank."""

    kind: str  # TRAINING or FORWARD
    start: int  # of the first microbatch's forward
    end: int  # of the last microbatch's computation
    busy_s: float  # in microbatches, forward and backward; with the waits of tensor-parallel ranks for each other


def find_passes(ranks: Sequence[RankProfile], steps: Sequence[StepTime]) -> list[list[Pass]]:
    """The passes of the steps, in order, as each rank made them.

    All ranks make every pass, so which lie in the steps is for the first rank's clock to say: those of other hosts may
    put one that is near a step's end into the next.
    """
    passes = [_passes(rank.spans) for rank in ranks]
    first = [span.start for span in _whole_passes(ranks[0].spans)]
    chosen = [number for number, start in enumerate(first) if any(step.start <= start < step.end for step in steps)]
    return [[of_rank[number] for number in chosen] for of_rank in passes]


def _whole_passes(spans: Iterable[Span]) -> list[Span]:
    return sorted((span for span in spans if span.name in (TRAINING, FORWARD)), key=lambda span: span.start)


def _passes(spans: Sequence[Span]) -> list[Pass]:
    compute = sorted((span for span in spans if span.name in COMPUTE), key=lambda span: span.start)
    starts = [span.start for span in compute]
    passes = []
    for each in _whole_passes(spans):
        inside = compute[bisect_left(starts, each.start) : bisect_left(starts, each.end)]
        busy_s = sum(span.seconds for span in inside)
        passes.append(Pass(each.name, inside[0].start, max(span.end for span in inside), busy_s))
    return passes


@dataclass(frozen=True)
class StageTime:
    """The passes of one kind on the ranks of one pipeline stage: sums over passes, means over ranks."""

    kind: str
    stage: int
    busy_s: float
    elapsed_s: float  # from the first microbatch on any stage of a pipeline to the last

    @property
    def bubble_frac(self) -> float:
        """Share of the time in which the stage computes nothing: it waits for other stages, or sends."""
        return 1 - self.busy_s / self.elapsed_s


def stage_times(ranks: Sequence[RankProfile], steps: Sequence[StepTime]) -> list[StageTime]:
    """By kind of pass and stage. Stages on several hosts are compared by their clocks."""
    pipelines: dict[int, list[tuple[int, list[Pass]]]] = defaultdict(list)
    for rank, passes in zip(ranks, find_passes(ranks, steps), strict=True):
        pipelines[rank.pipeline].append((rank.stage, passes))
    busy: dict[tuple[str, int], list[float]] = defaultdict(list)
    elapsed: dict[tuple[str, int], list[float]] = defaultdict(list)
    for members in pipelines.values():
        for together in zip(*(passes for _, passes in members), strict=True):
            seconds = (max(each.end for each in together) - min(each.start for each in together)) / 1e9
            for (stage, _), each in zip(members, together, strict=True):
                busy[each.kind, stage].append(each.busy_s)
                elapsed[each.kind, stage].append(seconds)
    num_pipelines = len(pipelines)
    return [
        StageTime(kind, stage, sum(busy[kind, stage]) / num_pipelines, sum(elapsed[kind, stage]) / num_pipelines)
        for kind, stage in sorted(busy)
    ]


def straggling(ranks: Sequence[RankProfile], steps: Sequence[StepTime]) -> dict[int, float]:
    """By stage: the time that the slowest share of the batch computes in training passes, over the mean share's.

    Of each pass the slowest, since its end is where all wait for each other: the gradient. 1: no rank waits. The ranks
    of one share and stage (tensor parallelism) compute together; their mean counts.
    """
    shares: dict[int, dict[int, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for rank, passes in zip(ranks, find_passes(ranks, steps), strict=True):
        seconds = [each.busy_s for each in passes if each.kind == TRAINING]
        shares[rank.stage][rank.data].append(seconds)
    ratios = {}
    for stage, of_stage in sorted(shares.items()):
        by_share = np.array([np.mean(members, axis=0) for members in of_stage.values()])  # [shares, passes]
        if by_share.size:
            ratios[stage] = float(by_share.max(axis=0).sum() / by_share.mean(axis=0).sum())
    return ratios


def time_by_name(spans: Iterable[Span]) -> dict[str, tuple[int, float]]:
    """How often each name occurs, and its seconds in all."""
    totals: dict[str, tuple[int, float]] = {}
    for span in spans:
        number, seconds = totals.get(span.name, (0, 0.0))
        totals[span.name] = number + 1, seconds + span.seconds
    return totals
