"""Plans of bundles: where ranks and engines lie, and what is refused because it would lie on two nodes."""

from __future__ import annotations

from typing import Any

import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.bundles import BundlePlan, check_fit, num_devices, order_rank_bundles, plan_bundles


def make_config(mode: str, parallel: dict[str, int], rollout: dict[str, int]) -> Config:
    values: dict[str, Any] = {"placement": {"mode": mode}, "parallel": parallel, "rollout": rollout}
    return Config.model_validate(values)


RECIPE_32B = ({"tensor": 8, "pipeline": 2, "data": 8}, {"tensor": 4, "replicas": 32})  # 16 nodes of 8
RECIPE_7B = ({"tensor": 2, "data": 4}, {"tensor": 2, "replicas": 4})


@pytest.mark.parametrize(
    ("mode", "layouts", "per_node", "sizes", "num_rank_bundles"),
    [
        ("colocated", RECIPE_32B, 8, [8] * 16, 16),
        ("disaggregated", RECIPE_32B, 8, [8] * 16 + [4] * 32, 16),
        ("colocated", RECIPE_7B, 8, [8], 1),
        ("disaggregated", RECIPE_7B, 8, [8] + [2] * 4, 1),
        ("colocated", RECIPE_7B, 4, [4, 4], 2),
        ("disaggregated", ({"tensor": 2, "data": 3}, {"tensor": 1, "replicas": 3}), 4, [4, 2, 1, 1, 1], 2),
        ("colocated", ({"tensor": 2}, {"replicas": 2}), 1000, [2], 1),
        ("disaggregated", ({}, {"pipeline": 2, "tensor": 2}), 8, [1, 4], 1),
    ],
)
def test_bundles_of_a_layout(mode: str, layouts: Any, per_node: int, sizes: list[int], num_rank_bundles: int) -> None:
    config = make_config(mode, *layouts)
    plan = plan_bundles(config, per_node)
    assert (list(plan.sizes), plan.num_rank_bundles) == (sizes, num_rank_bundles)
    assert plan.num_devices == num_devices(config)
    assert [place.bundle for place in plan.ranks] == [rank // per_node for rank in range(config.parallel.world_size)]
    assert max(len({plan.ranks[r].bundle for r in group}) for group in tensor_groups(config)) == 1
    workers = config.rollout.tensor * config.rollout.pipeline
    assert [len(place.devices) for place in plan.engines] == [workers] * config.rollout.replicas
    check_every_device_is_used(plan, mode)


@pytest.mark.parametrize(
    ("devices", "cause"),
    [
        ([8] * 16, None),
        ([8] * 15 + [4, 4], None),  # whether the bundles fit is Ray's to find out
        ([8] * 15, r"take 128 devices, the nodes of the Ray cluster have \[8, 8, .*; use smaller sizes, or more nodes"),
        ([4] * 32, "placement.gpus_per_node: 8 devices have to lie on one node, .*; set it to what a node has"),
    ],
)
def test_what_nodes_cannot_hold(devices: list[int], cause: str | None) -> None:
    plan = plan_bundles(make_config("colocated", *RECIPE_32B), 8)
    if cause is None:
        return check_fit(plan, devices)
    with pytest.raises(ValueError, match=cause):
        check_fit(plan, devices)


def tensor_groups(config: Config) -> list[range]:
    """Megatron's: ranks that follow each other."""
    size = config.parallel.tensor
    return [range(first, first + size) for first in range(0, config.parallel.world_size, size)]


def check_every_device_is_used(plan: BundlePlan, mode: str) -> None:
    """By one process of its own, or by one rank and one engine."""
    ranks = [(place.bundle, device) for place in plan.ranks for device in place.devices]
    engines = [(place.bundle, device) for place in plan.engines for device in place.devices]
    every = [(bundle, device) for bundle, size in enumerate(plan.sizes) for device in range(size)]
    if mode == "colocated":
        assert ranks == engines == every  # worker i of all is on the device of rank i
    else:
        assert ranks + engines == every
    assert plan.share * (2 if mode == "colocated" else 1) == 1


@pytest.mark.parametrize(
    ("mode", "layouts", "per_node", "message"),
    [
        ("disaggregated", ({"tensor": 4, "data": 3}, {}), 6, r"parallel.tensor = 4.*two nodes of 6.*divisor"),
        ("disaggregated", ({}, {"tensor": 16}), 8, r"rollout.tensor \* rollout.pipeline = 16.*one node, which has 8"),
        ("colocated", ({"data": 12}, {"tensor": 4, "replicas": 3}), 6, r"= 4: an engine would share.*two nodes of 6"),
    ],
)
def test_what_would_lie_on_two_nodes_is_refused(mode: str, layouts: Any, per_node: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_bundles(make_config(mode, *layouts), per_node)


def test_a_group_may_lie_on_two_nodes_of_cpus() -> None:
    config = make_config("disaggregated", {"tensor": 2}, {}).model_copy(update={"platform": "cpu"})
    assert plan_bundles(config, 1).sizes == (1, 1, 1)


def test_ranks_follow_the_order_of_their_nodes() -> None:
    """Ray gave the bundles to nodes as it liked; rank 0 is where it listens, then the addresses rise as numbers."""
    config = make_config("disaggregated", {"tensor": 2, "data": 7}, {"replicas": 2})
    plan = plan_bundles(config, 4)
    assert plan.sizes == (4, 4, 4, 2, 1, 1)
    addresses = ["10.0.0.10", "10.0.0.9", "10.0.0.30", "10.0.0.1", "10.0.0.1", "10.0.0.1"]
    assert order_rank_bundles(plan, addresses, first="10.0.0.30") == [2, 1, 0, 3, 4, 5]
    assert order_rank_bundles(plan, addresses, first="10.0.0.2") == [1, 0, 2, 3, 4, 5]
    assert order_rank_bundles(plan, ["b", "a", "c", "a", "a", "a"], first="c") == [2, 1, 0, 3, 4, 5]
