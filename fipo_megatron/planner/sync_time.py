"""Bytes and seconds of a weight sync, by its transport: from shard to shard, as whole tensors, or through files.

Files are on a storage that all nodes see. The engines begin to read when the policy has written (trainer/sync.py), and
a node writes or reads at `storage` of the bandwidth of one of its network adapters, however many of its processes do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.communication import bandwidth, replicas
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.parameters import bytes_of_type, count_experts
from fipo_megatron.reshard.layout import engine_layout, trainer_layout
from fipo_megatron.reshard.plan import ReshardPlan

INDEX_BYTES = 4  # of an element that has changed (reshard/transport/disk.py)


@dataclass(frozen=True)
class SyncTraffic:
    """Bytes of one weight sync."""

    total: float  # that all of the trainer's ranks send or write
    per_rank: float  # of them, on average
    per_worker: float  # that an engine's worker receives or reads, on average
    model: float  # of all weights, once
    stored: float  # that an engine's worker stores, on average


def sync_traffic(config: Config, shape: ModelShape, efficiencies: Efficiencies) -> SyncTraffic:
    """Of the policy's layout and the engines'. Shards: the plan's counted minimum (reshard/plan.py)."""
    trainer, engine = trainer_layout(config.parallel), engine_layout(config.rollout)
    plan, width = ReshardPlan(shape, trainer, engine), bytes_of_type(config.model.dtype)
    num_workers = engine.num_workers
    shards, whole = (float(n) * width for n in (plan.minimum_elements, plan.whole_tensor_elements))
    model, stored = whole / num_workers, shards / num_workers
    total, received = shards, stored
    if config.sync.transport == "disk":
        total = model
    elif config.sync.transport == "disk_delta":
        experts = float(count_experts(shape) * width)
        total, received = _changes(config, model - experts, experts, stored, efficiencies)
    elif config.sync.transport == "broadcast":
        total, received = whole, model
    return SyncTraffic(total, total / trainer.world_size, received, model, stored)


def _changes(
    config: Config, dense: float, experts: float, stored: float, efficiencies: Efficiencies
) -> tuple[float, float]:
    """What all ranks write, and what a worker reads, of `disk_delta`: each changed element with its index, or all where
    that is less. The engines share out the ranks that hold the same weights, so as many of these write."""
    width = bytes_of_type(config.model.dtype)
    changed = 1.0 if width == 4 else 1 - efficiencies.unchanged  # float32 has room for every update
    share = min(changed * (INDEX_BYTES + width) / width, 1.0)
    writers = [min(holders, config.rollout.replicas) for holders in replicas(config.parallel)]  # of dense and experts
    return (writers[0] * dense + writers[1] * experts) * share, stored * share


def sync_s(config: Config, shape: ModelShape, gpu: Gpu, efficiencies: Efficiencies) -> float:
    """The weights' way, the workers' storing of them, and with `sync.verify` the weights read twice to be added up."""
    traffic = sync_traffic(config, shape, efficiencies)
    verify = 2 * traffic.stored if config.sync.verify else 0.0
    store_s = (traffic.stored + verify) / (gpu.memory_bandwidth * efficiencies.memory)
    return _moving_s(config, gpu, efficiencies, traffic) + store_s + efficiencies.call_s


def _moving_s(config: Config, gpu: Gpu, efficiencies: Efficiencies, traffic: SyncTraffic) -> float:
    """From the trainer's memory to the workers'."""
    transport = config.sync.transport
    num_workers = engine_layout(config.rollout).num_workers
    storage = gpu.network_bandwidth * efficiencies.storage
    read = min(gpu.gpus_per_node, num_workers) * traffic.per_worker  # by the workers of a node
    gather_s = traffic.model / bandwidth(config, gpu, efficiencies, "pp")  # to rank 0, from all stages
    if transport == "disk":  # rank 0 writes; what several workers of a node read is fetched once
        return gather_s + (traffic.model + min(read, traffic.model)) / storage
    if transport == "disk_delta":
        written = min(gpu.gpus_per_node, config.parallel.world_size) * traffic.per_rank
        return (written + read) / storage
    if transport == "broadcast":  # gloo's tree, through host memory (reshard/transport/broadcast.py)
        hops = math.ceil(math.log2(1 + num_workers))
        copies_s = (
            0.0 if config.platform == "cpu" else 2 * traffic.model / (gpu.host_bandwidth * efficiencies.host_link)
        )
        return gather_s + copies_s + hops * traffic.model / (gpu.network_bandwidth * efficiencies.network)
    return max(traffic.per_rank, traffic.per_worker) / bandwidth(config, gpu, efficiencies, "sync")
