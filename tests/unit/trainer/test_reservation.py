"""Bundles in a real Ray cluster of two nodes, on whose GPUs nothing runs: Ray counts what it is told to have."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.reservation import Reservation


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """Of four devices each, which CUDA calls 4 to 7 there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = "4,5,6,7"
    folder = tempfile.mkdtemp(prefix="fipo-", dir="/tmp")
    cluster = Cluster()
    try:
        for address in ("127.0.0.1", "127.0.0.2"):
            head = {"gcs_server_port": free_port(), "temp_dir": folder, "include_dashboard": False}
            cluster.add_node(node_ip_address=address, num_cpus=4, num_gpus=4, **({} if cluster.head_node else head))
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def free_port() -> int:
    """Ray's default may be another cluster's."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Process:
    """Says where it is."""

    def where(self) -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]


def find_processes(reservation: Reservation) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The node and the devices of each rank, and of each engine, of actors that all live at once."""
    actors = [
        ray.remote(Process)
        .options(**reservation.options(place), runtime_env={"env_vars": reservation.environment(place)})
        .remote()
        for place in (*reservation.plan.ranks, *reservation.plan.engines)
    ]
    found = ray.get([actor.where.remote() for actor in actors], timeout=120)
    for actor in actors:
        ray.kill(actor)
    num_ranks = len(reservation.plan.ranks)
    return found[:num_ranks], found[num_ranks:]


def make_config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate({"timeouts": {"startup_s": 60}, **sections})


@pytest.mark.multiproc
def test_engines_of_two_workers_share_the_devices_of_two_ranks_each(two_nodes: Cluster) -> None:
    config = make_config(
        placement={"mode": "colocated"}, parallel={"tensor": 2, "data": 4}, rollout={"tensor": 2, "replicas": 4}
    )
    reservation = Reservation(config, on_cpu=False)
    try:
        ranks, engines = find_processes(reservation)
    finally:
        reservation.release()
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes()}
    first, second = nodes["127.0.0.1"], nodes["127.0.0.2"]
    devices = ["4,5,6,7", "5,4,6,7", "6,4,5,7", "7,4,5,6"]  # its own first
    assert ranks == [(node, visible) for node in (first, second) for visible in devices]
    assert engines == [(node, visible) for node in (first, second) for visible in ("4,5,6,7", "6,7,4,5")]


@pytest.mark.multiproc
def test_devices_of_their_own_overlap_nowhere(two_nodes: Cluster) -> None:
    config = make_config(parallel={"tensor": 2, "data": 2}, rollout={"tensor": 2, "replicas": 2})
    reservation = Reservation(config, on_cpu=False)
    try:
        ranks, engines = find_processes(reservation)
    finally:
        reservation.release()
    assert len({node for node, _ in ranks}) == len({node for node, _ in engines}) == 1
    assert [visible.split(",")[0] for _, visible in ranks] == ["4", "5", "6", "7"]
    assert sorted(visible.split(",")[:2] for _, visible in engines) == [["4", "5"], ["6", "7"]]
    assert ranks[0][0] != engines[0][0]


@pytest.mark.multiproc
def test_more_than_the_cluster_has_is_refused_with_what_it_has(two_nodes: Cluster) -> None:
    with pytest.raises(ValueError, match=r"take 9 devices.*\[4, 4\]"):
        Reservation(make_config(parallel={"data": 8}), on_cpu=False)
    with pytest.raises(ValueError, match="two nodes of 4"):
        Reservation(make_config(parallel={"tensor": 3, "data": 2}), on_cpu=False)
