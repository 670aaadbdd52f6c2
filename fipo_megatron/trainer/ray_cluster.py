"""A Ray cluster that others started and a run joins: what it must have, and each process's own address there."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import AuthenticationError, RpcError

from fipo_megatron.config.schema import Config

TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
# Resources of nodes that are for one part of a run alone; a cluster whose nodes have none of them takes both anywhere.
POOLS = {"policy": "fipo_trainer", "engine": "fipo_rollout"}
POOL_SHARE = 0.001  # that an actor takes: no limit, but a place
POLL_S = 1.0
CONNECT_S = 5.0


def check_cluster(ray_address: str, environment: Mapping[str, str]) -> None:
    """Raises ValueError unless it is known where the cluster is, and its token is here; see the two below."""
    try:
        find_address(ray_address, environment)
        check_token(environment)
    except ValueError as error:
        raise ValueError(f"cluster.ray_address = {ray_address!r}: {error}") from None


def find_address(ray_address: str, environment: Mapping[str, str]) -> str:
    """host:port of the cluster; `auto` is that of RAY_ADDRESS.

    Raises:
        ValueError: it is not there. Ray itself would take any cluster of this machine, whoever's it is.
    """
    if ray_address != "auto":
        return ray_address
    address = environment.get("RAY_ADDRESS")
    if address is None or not re.fullmatch(r"[^\s:/]+:\d+", address):
        raise ValueError(f"RAY_ADDRESS = {address!r}: must be host:port, that of the cluster's head")
    return address


def check_token(environment: Mapping[str, str]) -> None:
    """Raises ValueError unless the environment names a file with the cluster's token that its owner alone can read."""
    if environment.get("RAY_AUTH_MODE") != "token":
        raise ValueError(
            f"RAY_AUTH_MODE = {environment.get('RAY_AUTH_MODE')!r}, and whoever reaches a cluster without a token "
            "runs code there; start its nodes and the run with RAY_AUTH_MODE=token"
        )
    path = environment.get(TOKEN_PATH)
    if path is None:
        raise ValueError(f"no token; start its nodes and the run with {TOKEN_PATH}=FILE")
    if not Path(path).is_file():
        raise ValueError(f"{TOKEN_PATH} = {path!r} is not a file; give that which the cluster was started with")
    if Path(path).stat().st_mode & 0o077:
        raise ValueError(f"others can read {TOKEN_PATH} = {path!r}; chmod 600 it, and take another token")
    if not Path(path).read_text(encoding="utf-8").strip():
        raise ValueError(f"{TOKEN_PATH} = {path!r} is empty; give that which the cluster was started with")


def join(ray_address: str, num_cpus: int, num_gpus: int, object_store_bytes: int, timeout_s: float) -> str:
    """Become a driver of the cluster, once its nodes have what the run takes; this node's address there.

    Raises:
        ConnectionError: there is none, it refuses the token, or no node of it is on this machine.
        ValueError: it hasn't as many CPUs or GPUs after `timeout_s` seconds, or its nodes too little shared memory.
    """
    try:
        _connect(find_address(ray_address, os.environ))
    except OSError as error:
        raise ConnectionError(f"cluster.ray_address = {ray_address!r}: {error}") from error
    deadline = time.monotonic() + timeout_s
    while lack := find_lack(ray.nodes(), num_cpus, num_gpus, object_store_bytes):
        if time.monotonic() > deadline:
            raise ValueError(f"cluster.ray_address = {ray_address!r}: {lack}")
        time.sleep(POLL_S)
    return str(ray.util.get_node_ip_address())


def _connect(address: str) -> None:
    """Become a driver; first ask what Ray would wait for, for minutes and without a word on the cause."""
    os.environ.pop("RAY_AUTH_TOKEN", None)  # of a Ray of the run's own (trainer/__init__.py); it would hide the file
    ask_head(address)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")


def ask_head(address: str) -> str:
    """The id of the cluster whose head listens there, which it tells who has its token.

    Raises:
        PermissionError: it refuses the token.
        ConnectionError: nobody listens there, or no Ray.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(f"nobody listens at {address} ({error}); start Ray's head there") from error
    try:
        return str(ray._raylet.GcsClient(address=address).cluster_id.hex())
    except AuthenticationError as error:
        raise PermissionError(
            f"{address} refuses the token; give the file that the cluster was started with in {TOKEN_PATH}"
        ) from error
    except RpcError as error:
        raise ConnectionError(f"{address} does not answer as Ray's head; give its address ({error})") from error


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
        ValueError: RAY_ADDRESS or the token is missing.
        PermissionError: the cluster refuses the token.
        ConnectionError: nobody listens there after `timeout_s` seconds.
        TimeoutError: nodes are missing by then; the message names those that are there.
    """
    address = find_address("auto", os.environ)
    check_token(os.environ)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            _connect(address)
            break
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
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


def pools(mode: str) -> dict[str, dict[str, float]]:
    """The resources that an actor takes to be placed on the nodes of its part, by part of the run.

    Raises:
        ValueError: nodes are for engines alone, which share the ranks' devices: they would be idle.
    """
    available = ray.cluster_resources()
    if mode == "colocated" and POOLS["engine"] in available:
        raise ValueError(
            f"placement.mode = 'colocated': engines share the ranks' devices, and the nodes with {POOLS['engine']} "
            "would be idle; set placement.mode=disaggregated, or start the nodes without parts"
        )
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
