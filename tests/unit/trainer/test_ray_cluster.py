"""What a run asks of a Ray cluster that it joins. Joining is in tests/cluster/test_slurm.py."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import AuthenticationError, RpcError

from fipo_megatron.config.schema import Config
from fipo_megatron.trainer import ray_cluster
from fipo_megatron.trainer.placement import find_marked
from fipo_megatron.trainer.ray_cluster import (
    ask_head,
    at_its_node,
    check_cluster,
    find_address,
    find_interface,
    find_lack,
    join,
    pools,
    prepare_network,
)

ADDRESS = "10.0.0.1:6379"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(0o600)
    return file


def test_a_cluster_is_joined_with_the_token_of_a_private_file(token: Path) -> None:
    check_cluster(ADDRESS, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({}, "RAY_AUTH_MODE = None"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "FILE"}, "RAY_AUTH_MODE = 'disabled'"),
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_TOKEN_PATH=FILE"),
        # Of a Ray of the run's own, set when the trainer is imported.
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "own"}, "RAY_AUTH_TOKEN_PATH=FILE"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "missing"}, "'missing' is not a file"),
    ],
)
def test_without_a_token_none_is_joined(token: Path, environment: dict[str, str], complaint: str) -> None:
    environment = {key: value.replace("FILE", str(token)) for key, value in environment.items()}
    with pytest.raises(ValueError, match=complaint) as raised:
        check_cluster(ADDRESS, environment)
    assert f"cluster.ray_address = '{ADDRESS}'" in str(raised.value)


def test_a_token_that_others_can_read_is_refused(token: Path) -> None:
    token.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        check_cluster(ADDRESS, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})


def test_an_empty_token_is_none(token: Path) -> None:
    token.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        check_cluster(ADDRESS, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})


@pytest.mark.parametrize("environment", [{}, {"RAY_ADDRESS": ""}, {"RAY_ADDRESS": "auto"}, {"RAY_ADDRESS": "10.0.0.1"}])
def test_any_cluster_of_the_machine_is_not_taken(environment: dict[str, str]) -> None:
    assert find_address(ADDRESS, environment) == ADDRESS
    with pytest.raises(ValueError, match=r"cluster.ray_address = 'auto': RAY_ADDRESS = .*: must be host:port"):
        check_cluster("auto", environment)
    assert find_address("auto", {"RAY_ADDRESS": ADDRESS}) == ADDRESS


def test_where_nobody_listens_nobody_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"cluster.ray_address = '{address}': nobody listens at {address}"):
        join(address, num_cpus=1, num_gpus=0, object_store_bytes=0, timeout_s=60)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (AuthenticationError("InvalidAuthToken"), PermissionError, "refuses the token"),
        (RpcError("Timed out"), ConnectionError, "does not answer as Ray's head"),
    ],
)
def test_what_the_head_answers(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    """What a real one answers is in tests/smoke/test_train.py."""

    def answer(address: str) -> None:
        raise error

    monkeypatch.setattr(ray_cluster.ray._raylet, "GcsClient", answer)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(kind, match=message):
        ask_head(f"127.0.0.1:{server.getsockname()[1]}")


def test_nodes_for_engines_alone_are_not_left_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": 4, "fipo_trainer": 1, "fipo_rollout": 1})
    parts = {"policy": {"fipo_trainer": 0.001}, "engine": {"fipo_rollout": 0.001}}
    assert pools("disaggregated") == parts
    with pytest.raises(ValueError, match="fipo_rollout would be idle; set placement.mode=disaggregated"):
        pools("colocated")
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": 4})
    assert pools("colocated") == {"policy": {}, "engine": {}}


def node(**resources: float) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"object_store_memory": float(2**30), **resources}}


@pytest.mark.parametrize(
    ("nodes", "lack"),
    [
        ([node(CPU=8, GPU=4), node(CPU=8, GPU=4)], None),
        ([node(CPU=8, GPU=4), node(CPU=7, GPU=4)], "2 nodes have 15 CPUs, ranks and engines take 16"),
        ([node(CPU=16, GPU=8), {**node(CPU=16, GPU=8), "Alive": False}], None),
        ([node(CPU=16, GPU=4), {**node(CPU=16, GPU=8), "Alive": False}], "1 nodes have 4 GPUs"),
        ([node(CPU=16)], "1 nodes have 0 GPUs"),
        ([node(CPU=8, GPU=4), node(CPU=8, GPU=4, object_store_memory=2**29)], "0.50 GiB .* the longest takes 1.00"),
        ([], "0 nodes have 0 CPUs"),
    ],
)
def test_what_a_cluster_lacks_is_named(nodes: list[dict[str, Any]], lack: str | None) -> None:
    found = find_lack(nodes, num_cpus=16, num_gpus=8, object_store_bytes=2**30)
    if lack is None:
        assert found is None
    else:
        assert found is not None
        with pytest.raises(ValueError, match=lack):
            raise ValueError(found)


class Placed:
    """As the classes behind actors: the configuration is one of several arguments."""

    def __init__(self, folder: Path, config: Config, on_cpu: bool = False) -> None:
        self.folder, self.config, self.on_cpu = folder, config, on_cpu


def test_an_actor_listens_on_the_address_of_its_own_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.ray.util, "get_node_ip_address", lambda: "127.0.0.7")
    monkeypatch.setattr(os, "environ", {"VLLM_HOST_IP": "10.0.0.1", "NCCL_SOCKET_IFNAME": "ib0"})
    kind, config = at_its_node(Placed), Config(seed=3)
    placed = kind(Path("/model"), config, on_cpu=True)
    assert kind.__name__ == "Placed"  # also in the title of its process
    assert (placed.folder, placed.on_cpu, placed.config.seed) == (Path("/model"), True, 3)
    assert placed.config.cluster.address == "127.0.0.7"
    assert config.cluster.address == "127.0.0.1"
    assert os.environ == {"VLLM_HOST_IP": "127.0.0.7", "NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "lo"}


def test_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_interface("127.0.0.1") == find_interface("127.0.0.9") == "lo"
    assert find_interface("203.0.113.77") is None
    monkeypatch.setattr(os, "environ", {})
    prepare_network("203.0.113.77")  # left to the libraries
    assert os.environ == {"VLLM_HOST_IP": "203.0.113.77"}


def test_processes_are_found_by_their_environment() -> None:
    with subprocess.Popen(["sleep", "60"], env={"FIPO_RUN": "of this test"}) as process:
        try:
            assert [found.pid for found in find_marked("FIPO_RUN", "of this test")] == [process.pid]
            assert find_marked("FIPO_RUN", "of another") == []
        finally:
            process.kill()
