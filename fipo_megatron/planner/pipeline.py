"""What each stage of a pipeline does at which time, from the times of the actual microbatches.

The order of work on a stage is Megatron-Core's: 1F1B (Narayanan et al. 2021, "Efficient large-scale language model
training on GPU clusters", section 2.2), interleaved where stages have several model chunks. A piece of work begins when
its stage is free and its input is there; sending takes no time here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Pass = Literal["forward", "backward"]


class Work(NamedTuple):
    """A microbatch on a model chunk."""

    kind: Pass
    chunk: int
    microbatch: int


class Span(NamedTuple):
    """When a stage did a piece of work."""

    work: Work
    start_s: float
    end_s: float


@dataclass(frozen=True)
class PipelineTrace:
    """A pass of microbatches through a pipeline."""

    stages: tuple[tuple[Span, ...], ...]  # of each stage, in order

    @property
    def seconds(self) -> float:
        """Until the last stage has done its last piece."""
        return max(spans[-1].end_s for spans in self.stages)

    @property
    def busy_s(self) -> np.ndarray:
        """Of each stage, float64 [stages]."""
        return np.array([sum(span.end_s - span.start_s for span in spans) for spans in self.stages])

    @property
    def bubble(self) -> np.ndarray:
        """Share of the whole time in which a stage waits, float64 [stages]; of p stages and m equal microbatches with v
        model chunks a stage it is (p - 1) / (v m + p - 1) on each."""
        return 1 - self.busy_s / self.seconds


def simulate_pipeline(forward_s: np.ndarray, backward_s: np.ndarray | None = None) -> PipelineTrace:
    """Seconds of each microbatch on each model chunk of each stage, float64 [stages, chunks, microbatches], become a
    schedule. Without `backward_s` there are forward passes alone, as of log-probs.

    Raises:
        ValueError: several chunks a stage, and microbatches that are no multiple of the stages.
    """
    num_stages, num_chunks, num_microbatches = forward_s.shape
    if num_chunks > 1 and num_microbatches % num_stages:
        raise ValueError(
            f"{num_microbatches} microbatches on {num_stages} stages of {num_chunks} chunks: the interleaved schedule "
            "takes a multiple of the stages"
        )
    orders = [stage_order(stage, forward_s.shape, backward_s is not None) for stage in range(num_stages)]
    times: dict[Pass, list[list[list[float]]]] = {"forward": forward_s.tolist()}
    if backward_s is not None:
        times["backward"] = backward_s.tolist()
    ends: dict[tuple[Pass, int, int], float] = {}  # (pass, place of the chunk in the model, microbatch)
    last_place = num_stages * num_chunks - 1
    stages: list[list[Span]] = [[] for _ in range(num_stages)]
    num_left = sum(map(len, orders))
    while num_left:
        num_before = num_left
        for stage, order in enumerate(orders):
            spans = stages[stage]
            while len(spans) < len(order):
                work = order[len(spans)]
                place = work.chunk * num_stages + stage
                needed = _input_of(work, place, last_place)
                if needed is not None and needed not in ends:
                    break
                start = max(spans[-1].end_s if spans else 0.0, ends[needed] if needed else 0.0)
                end = start + times[work.kind][stage][work.chunk][work.microbatch]
                spans.append(Span(work, start, end))
                ends[work.kind, place, work.microbatch] = end
                num_left -= 1
        assert num_left < num_before, "the schedule's order waits for itself"
    return PipelineTrace(tuple(map(tuple, stages)))


def _input_of(work: Work, place: int, last_place: int) -> tuple[Pass, int, int] | None:
    """What a piece of work waits for: the chunk before it, in the backward pass that after it."""
    if work.kind == "forward":
        return ("forward", place - 1, work.microbatch) if place else None
    if place == last_place:
        return "forward", place, work.microbatch
    return "backward", place + 1, work.microbatch


def stage_order(stage: int, shape: tuple[int, ...], with_backward: bool) -> list[Work]:
    """What a stage works on, in order; `shape` is (stages, chunks, microbatches).

    As Megatron-Core's `get_schedule_table` and `get_pp_rank_microbatches`: in groups of as many microbatches as stages,
    chunk after chunk; forward passes alone until the pipeline is filled, then one of each in turn.
    """
    num_stages, num_chunks, num_microbatches = shape
    group = num_stages if num_chunks > 1 else num_microbatches
    table = [
        (chunk, microbatch)
        for first in range(0, num_microbatches, group)
        for chunk in range(num_chunks)
        for microbatch in range(first, first + group)
    ]
    forward = [Work("forward", chunk, microbatch) for chunk, microbatch in table]
    if not with_backward:
        return forward
    backward = [Work("backward", num_chunks - 1 - chunk, microbatch) for chunk, microbatch in table]
    num_after = num_stages - stage - 1
    num_warmup = num_after if num_chunks == 1 else 2 * num_after + (num_chunks - 1) * num_stages
    num_warmup = min(num_warmup, len(table))
    in_turn = [work for pair in zip(forward[num_warmup:], backward, strict=False) for work in pair]
    return forward[:num_warmup] + in_turn + backward[len(table) - num_warmup :]
