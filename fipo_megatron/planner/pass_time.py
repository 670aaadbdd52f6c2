"""Seconds of the policy's passes over packed microbatches: computing, communication, pipeline, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.parallel.plan import PackingPlan, PackingUnits, microbatch_tokens, plan_packing
from fipo_megatron.planner.communication import (
    bandwidth,
    pass_collectives,
    pass_traffic,
    replicas,
    seconds,
    stage_weights,
    update_traffic,
)
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.flops import elementwise_accesses, model_cost
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.parameters import MAIN_BYTES, MOMENT_BYTES, bytes_of_type
from fipo_megatron.planner.pipeline import simulate_pipeline

ROW, MICROBATCH = 2, 3  # places of a row of the head and of a microbatch among the units of work: token, pair, both


@dataclass(frozen=True)
class Microbatches:
    """What the microbatches of a plan hold, float64 [data ranks, microbatches]: over all context-parallel ranks."""

    tokens: np.ndarray  # positions, padding included
    pairs: np.ndarray  # of a token and one that it attends to
    rows: np.ndarray  # of the head
    plan: PackingPlan

    @classmethod
    def of_plan(cls, config: Config, lengths: Lengths, plan: PackingPlan) -> Microbatches:
        """What a plan of samples of `lengths` gives each microbatch."""
        units = packing_units(config)
        positions = lengths.sequence - 1.0  # the last token is a target only
        padded = units.sequence_lens(lengths.sequence)
        of_sample = np.stack([padded, positions * (positions + 1) / 2, lengths.response])

        def of(chosen: tuple[int, ...]) -> np.ndarray:
            tokens, pairs, rows = of_sample[:, list(chosen)].sum(1)
            return np.array([units.total_len(int(tokens)), pairs, rows])

        held = np.array([[of(chosen) for chosen in rank] for rank in plan.microbatches])
        return cls(held[..., 0], held[..., 1], held[..., 2], plan)


def packing_units(config: Config) -> PackingUnits:
    """Those of a layout."""
    parallel = config.parallel
    return PackingUnits(parallel.context, parallel.tensor if parallel.sequence_parallel else 1)


def plan_samples(config: Config, shape: ModelShape, lengths: Lengths, samples: Sequence[int]) -> PackingPlan:
    """The plan that the policy would make of samples (trainer/policy.py)."""
    parallel = config.parallel
    return plan_packing(
        samples,
        lengths.sequence,
        model_cost(shape).of(lengths.sequence, lengths.response),
        packing_units(config),
        data_size=parallel.data,
        microbatch_tokens=microbatch_tokens(config),
        microbatch_multiple=parallel.pipeline if parallel.virtual_pipeline else 1,
    )


def pack(config: Config, shape: ModelShape, lengths: Lengths, samples: Sequence[int]) -> Microbatches:
    """The microbatches that the policy would make of samples, by its own plan."""
    return Microbatches.of_plan(config, lengths, plan_samples(config, shape, lengths, samples))


@dataclass(frozen=True)
class PassTime:
    """Of one pass over a plan's microbatches, backward pass included where there is one."""

    seconds: float  # of the slowest data-parallel rank
    bubble: np.ndarray  # [stages], the share of it in which a stage waits for others

    @property
    def busy_s(self) -> np.ndarray:
        """[stages]"""
        return self.seconds * (1 - self.bubble)


class PassModel:
    """Seconds of a policy's passes on a GPU, at some efficiencies."""

    def __init__(self, config: Config, shape: ModelShape, gpu: Gpu, efficiencies: Efficiencies) -> None:
        self.config, self.shape, self.gpu, self.efficiencies = config, shape, gpu, efficiencies
        self.stages = range(config.parallel.pipeline)
        # [stages, (token, pair, row, microbatch)]: seconds of each, forward and backward
        speeds = [self._speeds(stage) for stage in self.stages]
        self._forward = np.array([forward for forward, _ in speeds])
        self._backward = np.array([backward for _, backward in speeds])

    def forward_pass(self, microbatches: Microbatches) -> PassTime:
        """Log-probs: all microbatches through all stages."""
        return self._pipeline(self.times(microbatches)[0], None)

    def training_pass(self, microbatches: Microbatches) -> PassTime:
        """Forward and backward passes of one update, one forward and one backward in turn."""
        return self._pipeline(*self.times(microbatches))

    def times(self, microbatches: Microbatches) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of forward and of backward passes, float64 [stages, chunks, data ranks, microbatches]."""
        return self._of_microbatches(self._forward, microbatches), self._of_microbatches(self._backward, microbatches)

    def update_s(self) -> tuple[float, float]:
        """What follows on an update's passes: gradients and weights between data-parallel ranks, and the optimizer.

        A GPU's memory is read or written: gradients three times (zeros, their norm twice), and of the rank's share
        gradient, moments and main weights once in and but for the gradient once out.
        """
        config, efficiencies = self.config, self.efficiencies
        width = bytes_of_type(config.model.dtype)
        state = MOMENT_BYTES + MAIN_BYTES if width == 2 else MOMENT_BYTES + width
        dense, experts = replicas(config.parallel) if config.parallel.distributed_optimizer else (1, 1)
        communication, optimizer = 0.0, 0.0
        for stage in self.stages:
            held = stage_weights(self.shape, config.parallel, stage)
            sent = update_traffic(config, self.shape, stage)
            communication = max(communication, sent / bandwidth(config, self.gpu, efficiencies, "dp"))
            moved = 3 * 4 * (held.dense + held.experts) + (4 + 2 * state) * (
                held.dense / dense + held.experts / experts
            )
            optimizer = max(optimizer, moved / (self.gpu.memory_bandwidth * efficiencies.memory))
        return communication, optimizer

    def _speeds(self, stage: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a token, a pair, a row and a microbatch on a stage: forward [4], backward [4]."""
        config, shape, efficiencies = self.config, self.shape, self.efficiencies
        computed = self._compute_speeds(stage)
        layers_again = np.array([1.0, 1.0, 0.0, 0.0]) * (config.trainer.recompute == "full")
        if config.trainer.recompute == "selective":
            layers_again = np.array([0.0, 1.0, 0.0, 0.0])
        again = layers_again + np.array([0.0, 0.0, 1.0, 0.0])  # the head's logits are not kept
        forward, backward = computed.copy(), computed * (2 + again)
        for unit, (tokens, rows) in enumerate([(1.0, 0.0), (0.0, 0.0), (0.0, 1.0)]):
            traffic = pass_traffic(config, shape, stage, tokens, rows)
            forward[unit] += seconds(config, self.gpu, efficiencies, traffic.forward)
            backward[unit] += seconds(config, self.gpu, efficiencies, traffic.backward)
            within_layers = {**traffic.forward, "pp": 0.0}
            backward[unit] += layers_again[0] * seconds(config, self.gpu, efficiencies, within_layers)
        waits, waits_backward = pass_collectives(config, shape, stage)
        forward[MICROBATCH] += waits * efficiencies.collective_s
        backward[MICROBATCH] += (waits_backward + layers_again[0] * waits) * efficiencies.collective_s
        return forward, backward

    def _compute_speeds(self, stage: int) -> np.ndarray:
        shape, parallel, efficiencies = self.shape, self.config.parallel, self.efficiencies
        cost, stages = model_cost(shape), parallel.pipeline
        width = bytes_of_type(self.config.model.dtype)
        peak = self.gpu.flops(width) * parallel.tensor * parallel.context  # of the ranks that share a microbatch
        experts = 6.0 * shape.num_layers * shape.hidden_size * shape.moe_intermediate_size * shape.experts_per_token
        matrices = (cost.per_token - experts) / efficiencies.matmul + experts / efficiencies.grouped_matmul
        return np.array(
            [
                matrices / stages / peak + self._elementwise_s() / stages,
                cost.per_pair / efficiencies.attention / stages / peak,
                cost.per_response_token / efficiencies.head / peak if stage == stages - 1 else 0.0,
                efficiencies.microbatch_s,
            ]
        )

    def _elementwise_s(self) -> float:
        """Of one token in all layers; hidden states are shared out among tensor-parallel ranks by sequence parallelism
        alone."""
        parallel = self.config.parallel
        hidden, shared = elementwise_accesses(self.shape)
        accesses = hidden / (parallel.tensor if parallel.sequence_parallel else 1) + shared / parallel.tensor
        num_bytes = self.shape.num_layers * accesses * bytes_of_type(self.config.model.dtype) / parallel.context
        return num_bytes / (self.gpu.memory_bandwidth * self.efficiencies.elementwise)

    def _of_microbatches(self, speeds: np.ndarray, held: Microbatches) -> np.ndarray:
        """Seconds, [stages, chunks, data ranks, microbatches]: a stage's layers are shared out evenly among its model
        chunks, and the head is in the last one."""
        num_chunks = self.config.parallel.virtual_pipeline or 1
        of_chunk = np.repeat(speeds[:, None] / num_chunks, num_chunks, axis=1)
        of_chunk[:, :, ROW] = 0.0
        of_chunk[:, -1, ROW] = speeds[:, ROW]
        units = np.stack([held.tokens, held.pairs, held.rows, np.ones_like(held.tokens)])
        return np.einsum("scu,udm->scdm", of_chunk, units)

    def _pipeline(self, forward: np.ndarray, backward: np.ndarray | None) -> PassTime:
        """Data-parallel ranks meet after the last microbatch, and ranks that share out experts in each: these are as
        slow as the slowest in each, of others the one with the most work is followed.

        Ranks that share devices (`Gpu.num_shared`) take turns: nobody waits in vain, but all work is done on those.
        """
        both = forward if backward is None else forward + backward
        if self.config.parallel.expert > 1:
            trace = simulate_pipeline(forward.max(2), None if backward is None else backward.max(2))
        else:
            rank = int(both.sum((0, 1, 3)).argmax())
            trace = simulate_pipeline(forward[:, :, rank], None if backward is None else backward[:, :, rank])
        seconds = trace.seconds
        if self.gpu.num_shared is not None:
            ranks_at_once = self.config.parallel.tensor * self.config.parallel.context  # on each microbatch
            seconds = max(seconds, float(both.sum()) * ranks_at_once / self.gpu.num_shared)
        return PassTime(seconds, 1 - trace.busy_s / seconds)
