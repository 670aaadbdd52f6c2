"""Which devices each process of a run gets: pure plans, which trainer/reservation.py asks Ray for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from fipo_megatron.config.schema import Config, RolloutConfig


@dataclass(frozen=True)
class Place:
    """Of one rank, or of one engine with all its workers."""

    bundle: int
    devices: tuple[int, ...]  # of that bundle


@dataclass(frozen=True)
class BundlePlan:
    """Bundles of devices, each of which lies on one node; the first `num_rank_bundles` hold the ranks, in order."""

    sizes: tuple[int, ...]  # devices of each bundle
    num_rank_bundles: int
    ranks: tuple[Place, ...]
    engines: tuple[Place, ...]
    share: float  # of each of its devices that a process takes

    @property
    def num_devices(self) -> int:
        return sum(self.sizes)


def num_engine_workers(rollout: RolloutConfig) -> int:
    """Workers of all engines."""
    return rollout.replicas * rollout.tensor * rollout.pipeline


def num_devices(config: Config) -> int:
    """Devices that ranks and engines take."""
    world_size = config.parallel.world_size
    if config.placement.mode == "colocated":
        return world_size
    return world_size + num_engine_workers(config.rollout)


def plan_bundles(config: Config, devices_per_node: int) -> BundlePlan:
    """The bundles of a checked configuration on nodes of `devices_per_node`: rank r is on node r // devices_per_node.

    Disaggregated: a bundle a node for the ranks, then a bundle an engine. Colocated: the ranks' bundles, and engine i
    has the devices of ranks i * workers to (i + 1) * workers - 1.

    Raises:
        ValueError: an engine, or on GPUs a tensor-parallel group, would lie on two nodes.
    """
    world_size, per_node = config.parallel.world_size, devices_per_node
    _check_nodes(config, per_node)
    rank_sizes = [min(per_node, world_size - first) for first in range(0, world_size, per_node)]
    ranks = tuple(Place(rank // per_node, (rank % per_node,)) for rank in range(world_size))
    workers = config.rollout.tensor * config.rollout.pipeline
    if config.placement.mode == "colocated":
        firsts = range(0, world_size, workers)
        engines = [
            Place(first // per_node, tuple(range(first % per_node, first % per_node + workers))) for first in firsts
        ]
        return BundlePlan(tuple(rank_sizes), len(rank_sizes), ranks, tuple(engines), share=0.5)
    engines = [Place(len(rank_sizes) + i, tuple(range(workers))) for i in range(config.rollout.replicas)]
    sizes = (*rank_sizes, *(workers for _ in engines))
    return BundlePlan(sizes, len(rank_sizes), ranks, tuple(engines), share=1.0)


def check_fit(plan: BundlePlan, devices: Sequence[int]) -> None:
    """Raises ValueError if nodes of so many devices each can't hold the plan: it would be waited for in vain."""
    if plan.num_devices > sum(devices):
        raise ValueError(
            f"parallel, rollout: ranks and engines take {plan.num_devices} devices, the nodes of the Ray "
            f"cluster have {sorted(devices, reverse=True)}; use smaller sizes, or more nodes"
        )
    if max(plan.sizes) > max(devices):
        raise ValueError(
            f"placement.gpus_per_node: {max(plan.sizes)} devices have to lie on one node, the Ray cluster has "
            f"nodes of {sorted(devices, reverse=True)}; set it to what a node has"
        )


def _check_nodes(config: Config, per_node: int) -> None:
    parallel, rollout = config.parallel, config.rollout
    workers = rollout.tensor * rollout.pipeline
    # Between CPUs it makes no difference which way a group's messages take.
    if config.platform != "cpu" and parallel.world_size > per_node and per_node % parallel.tensor:
        raise ValueError(
            f"parallel.tensor = {parallel.tensor}: its groups would lie on two nodes of {per_node} devices; set it to "
            "a divisor of placement.gpus_per_node"
        )
    if workers > per_node:
        raise ValueError(
            f"rollout.tensor * rollout.pipeline = {workers}: an engine's workers lie on one node, which has {per_node} "
            "devices (placement.gpus_per_node); lower one of the two, and raise rollout.replicas"
        )
    if config.placement.mode == "colocated" and parallel.world_size > per_node and per_node % workers:
        raise ValueError(
            f"rollout.tensor * rollout.pipeline = {workers}: an engine would share the devices of two nodes of "
            f"{per_node}; set it to a divisor of placement.gpus_per_node"
        )


def order_rank_bundles(plan: BundlePlan, addresses: Sequence[str], first: str) -> list[int]:
    """For each of the plan's bundles the one that takes its place, so that ranks follow the order of their nodes.

    `addresses` are those of the bundles' nodes. The node `first`, on which rank 0 listens, comes before the others. A
    last bundle of fewer devices stays the last of the ranks', engines' bundles stay where they are.
    """
    order = list(range(len(plan.sizes)))
    whole = [i for i in range(plan.num_rank_bundles) if plan.sizes[i] == plan.sizes[0]]
    order[: len(whole)] = sorted(whole, key=lambda i: (addresses[i] != first, _sort_key(addresses[i]), i))
    return order


def _sort_key(address: str) -> tuple[int, int, str]:
    """Addresses as numbers, then names."""
    try:
        return 0, int(ip_address(address)), address
    except ValueError:
        return 1, 0, address
