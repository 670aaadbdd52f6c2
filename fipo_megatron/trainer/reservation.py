"""The bundles of a plan in Ray's cluster, as one placement group: all of them, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.bundles import Place, check_fit, order_rank_bundles, plan_bundles

PIN = 1e-3  # of a node's own resource, of which it has 1


class Reservation:
    """Devices of all processes of a run, reserved until they are released or Ray is shut down.

    Ray keeps others off the devices; which of them a process uses is said here, because a process of several devices
    can't ask Ray for a part of each. It sees its own devices first, then the others of its node: CUDA opens memory of
    another process on visible devices alone.

    Raises:
        ValueError: the plan does not fit the cluster's nodes.
        RuntimeError: the devices are not free within `timeouts.startup_s`.
    """

    def __init__(self, config: Config, on_cpu: bool, pools: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """`pools`: what the ranks' bundles (`policy`) and the engines' (`engine`) need of a node beside devices."""
        self._resource = "CPU" if on_cpu else "GPU"
        nodes = [node for node in ray.nodes() if node["Alive"]]
        devices = {node["NodeID"]: int(node["Resources"].get(self._resource, 0)) for node in nodes}
        self.devices_per_node = config.placement.gpus_per_node or max(devices.values())
        if self.devices_per_node == 0:
            raise ValueError("platform = 'cuda': no node of the Ray cluster has a GPU; set platform=cpu")
        self.plan = plan_bundles(config, self.devices_per_node)
        check_fit(self.plan, list(devices.values()))
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
        parts = ["policy"] * self.plan.num_rank_bundles
        parts += ["engine"] * (len(self.plan.sizes) - self.plan.num_rank_bundles)
        bundles: list[dict[str, float]] = [
            {"CPU": size, self._resource: size, **(pools or {}).get(part, {})}
            for size, part in zip(self.plan.sizes, parts, strict=True)
        ]
        home = {f"node:{config.cluster.address}": PIN}  # of rank 0, which listens there
        if any(_has(node["Resources"], bundles[0] | home) for node in nodes):
            bundles[0] |= home
        # Ray takes it back when this driver leaves.
        self.group = _reserve(bundles, config.placement.strategy.upper(), config.timeouts.startup_s)
        nodes_of = placement_group_table(self.group)["bundles_to_node_id"]
        self._nodes = [nodes_of[i] for i in range(len(bundles))]
        self._order = order_rank_bundles(self.plan, [addresses[node] for node in self._nodes], config.cluster.address)
        self._device_ids = [] if on_cpu else [self._ids_of(i, size) for i, size in enumerate(self.plan.sizes)]

    def options(self, place: Place) -> dict[str, Any]:
        """Ray's options of an actor there, without its environment."""
        return {
            "num_cpus": self.plan.share * len(place.devices),
            "num_gpus": 0,  # see `environment`
            "scheduling_strategy": self._strategy(self._order[place.bundle]),
        }

    def environment(self, place: Place) -> dict[str, str]:
        """What tells CUDA which devices a process there has; nothing on a CPU."""
        if not self._device_ids:
            return {}
        bundle = self._order[place.bundle]
        own = [self._device_ids[bundle][i] for i in place.devices]
        on_node = [
            device
            for ids, node in zip(self._device_ids, self._nodes, strict=True)
            if node == self._nodes[bundle]
            for device in ids
        ]
        others = sorted((device for device in on_node if device not in own), key=_by_number)
        return {"CUDA_VISIBLE_DEVICES": ",".join([*own, *others]), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}

    def _ids_of(self, bundle: int, size: int) -> list[str]:
        """What CUDA calls the devices of a bundle on its node."""
        task = ray.remote(_accelerator_ids).options(
            num_cpus=0, num_gpus=size, scheduling_strategy=self._strategy(bundle)
        )
        return sorted(ray.get(task.remote()), key=_by_number)

    def _strategy(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)


def _reserve(bundles: list[dict[str, float]], strategy: str, timeout_s: float) -> PlacementGroup:
    group = placement_group(bundles, strategy=strategy)
    if not group.wait(timeout_s):
        remove_placement_group(group)
        raise RuntimeError(
            f"the Ray cluster did not give {bundles} within {timeout_s:g} s: it has {ray.available_resources()} free; "
            "another run may hold the rest: end it, or raise timeouts.startup_s"
        )
    return group


def _has(resources: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0) >= amount for name, amount in needed.items())


def _accelerator_ids() -> list[str]:
    return ray.get_runtime_context().get_accelerator_ids()["GPU"]


def _by_number(device: str) -> tuple[int, str]:
    return (int(device), "") if device.isdigit() else (0, device)
