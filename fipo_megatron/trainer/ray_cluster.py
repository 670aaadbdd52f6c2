"""A Ray cluster that others started and a run joins: what it must have, and each process's own address there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray

from fipo_megatron.config.schema import Config

TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
# Resources of nodes that are for one part of a run alone; a cluster whose nodes have none of them takes both anywhere.
POOLS = {"policy": "fipo_trainer", "engine": "fipo_rollout"}
POOL_SHARE = 0.001  # that an actor takes: no limit, but a place
POLL_S = 1.0


def check_token(ray_address: str, environment: Mapping[str, str]) -> None:
    """Raises ValueError unless the environment names a file with the cluster's token that its owner alone can read."""
    key = f"cluster.ray_address = {ray_address!r}: "
    if environment.get("RAY_AUTH_MODE") != "token":
        raise ValueError(
            f"{key}RAY_AUTH_MODE = {environment.get('RAY_AUTH_MODE')!r}, and whoever reaches a cluster without a token "
            "runs code there; start its nodes and the run with RAY_AUTH_MODE=token"
        )
    path = environment.get(TOKEN_PATH)
    if path is None:
        raise ValueError(f"{key}no token; start its nodes and the run with {TOKEN_PATH}=FILE")
    if not Path(path).is_file():
        raise ValueError(f"{key}{TOKEN_PATH} = {path!r} is not a file; give that which the cluster was started with")
    if Path(path).stat().st_mode & 0o077:
        raise ValueError(f"{key}others can read {TOKEN_PATH} = {path!r}; chmod 600 it, and take another token")


def join(ray_address: str, num_cpus: int, num_gpus: int, object_store_bytes: int, timeout_s: float) -> str:
    """Become a driver of the cluster, once its nodes have what the run takes; this node's address there.

    Raises:
        ConnectionError: there is none, it refuses the token, or no node of it is on this machine.
        ValueError: it hasn't as many CPUs or GPUs after `timeout_s` seconds, or its nodes too little shared memory.
    """
    try:
        _connect(ray_address)
    except ConnectionError as error:
        raise ConnectionError(
            f"cluster.ray_address = {ray_address!r}: {error}; none is there, or it has another token than {TOKEN_PATH}"
        ) from error
    deadline = time.monotonic() + timeout_s
    while lack := find_lack(ray.nodes(), num_cpus, num_gpus, object_store_bytes):
        if time.monotonic() > deadline:
            raise ValueError(f"cluster.ray_address = {ray_address!r}: {lack}")
        time.sleep(POLL_S)
    return str(ray.util.get_node_ip_address())


def _connect(ray_address: str) -> None:
    os.environ.pop("RAY_AUTH_TOKEN", None)  # of a Ray of the run's own (trainer/__init__.py); it would hide the file
    ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")


def find_lack(nodes: list[dict[str, Any]], num_cpus: int, num_gpus: int, object_store_bytes: int) -> str | None:
    """What the nodes, as Ray lists them, have too little of, in words; None if they have all."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    for name, needed in (("CPU", num_cpus), ("GPU", num_gpus)):
        available = int(sum(of_node.get(name, 0) for of_node in resources))
        if available < needed:
            return (
                f"its {len(resources)} nodes have {available} {name}s, ranks and engines take {needed}; add nodes, or "
                "use smaller sizes in parallel and rollout"
            )
    least = min((of_node.get("object_store_memory", 0) for of_node in resources), default=0)
    if least < object_store_bytes:
        return (
            f"a node has {least / 2**30:.2f} GiB of shared memory for batches, the longest takes "
            f"{object_store_bytes / 2**30:.2f}; start it with a larger --object-store-memory"
        )
    return None


def wait_for_nodes(num_nodes: int, timeout_s: float) -> list[str]:
    """Addresses of the cluster at RAY_ADDRESS, once it has that many nodes.

    Raises:
        ConnectionError: there is none, or it refuses the token.
        TimeoutError: nodes are missing after `timeout_s` seconds; the message names those that are there.
    """
    deadline = time.monotonic() + timeout_s
    _connect("auto")
    try:
        while True:
            addresses = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
            if len(addresses) >= num_nodes:
                return addresses
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{len(addresses)} of {num_nodes} Ray nodes are there after {timeout_s:g} s: {', '.join(addresses)}"
                )
            time.sleep(POLL_S)
    finally:
        ray.shutdown()


def pools() -> dict[str, dict[str, float]]:
    """The resources that an actor takes to be placed on the nodes of its part, by part of the run."""
    available = ray.cluster_resources()
    return {part: {name: POOL_SHARE} if name in available else {} for part, name in POOLS.items()}


def at_its_node(kind: type) -> type:
    """The class, for an actor of a cluster: its Config has the address of the node that the actor is on."""

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        address = str(ray.util.get_node_ip_address())
        prepare_network(address)
        placed = [with_address(value, address) if isinstance(value, Config) else value for value in arguments]
        kind.__init__(self, *placed, **options)  # type: ignore[misc]

    return type(kind.__name__, (kind,), {"__init__": __init__, "__doc__": kind.__doc__})


def with_address(config: Config, address: str) -> Config:
    """The configuration of a process that listens on `address`."""
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": address})})


def prepare_network(address: str) -> None:
    """Let process groups and engines of this process use the interface of `address`, unless the user chose another."""
    os.environ["VLLM_HOST_IP"] = address
    interface = find_interface(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def find_interface(address: str) -> str | None:
    """The name of the network interface that has the address; loopback has all that begin with 127."""
    loopback = address.startswith("127.")
    for name, of_interface in psutil.net_if_addrs().items():
        own = [entry.address for entry in of_interface if entry.family in (socket.AF_INET, socket.AF_INET6)]
        if address in own or (loopback and any(other.startswith("127.") for other in own)):
            return name
    return None
