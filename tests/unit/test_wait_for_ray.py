"""The command that scripts wait with."""

from __future__ import annotations

from pathlib import Path

import pytest

from fipo_megatron.trainer import ray_cluster
from tools import wait_for_ray


def test_the_nodes_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[int, float]] = []

    def wait_for_nodes(num_nodes: int, timeout_s: float) -> list[str]:
        asked.append((num_nodes, timeout_s))
        return ["10.0.0.1", "10.0.0.2"]

    monkeypatch.setattr(ray_cluster, "wait_for_nodes", wait_for_nodes)
    assert wait_for_ray.main(["--nodes", "2", "--timeout", "5"]) == 0
    assert asked == [(2, 5.0)]
    assert capsys.readouterr().out == "2 Ray nodes: 10.0.0.1, 10.0.0.2\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TimeoutError("1 of 2 Ray nodes"), 1),
        (ConnectionError("no cluster"), 1),
        (PermissionError("refuses the token"), 1),
        (ValueError("RAY_ADDRESS = None"), 2),
    ],
)
def test_a_cluster_that_is_not_whole_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    def wait_for_nodes(*_: object) -> list[str]:
        raise error

    monkeypatch.setattr(ray_cluster, "wait_for_nodes", wait_for_nodes)
    assert wait_for_ray.main(["--nodes", "2"]) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_no_node_is_nothing_to_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        wait_for_ray.main(["--nodes", "0"])
    assert "--nodes 0: must be 1 or more" in capsys.readouterr().err


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text("secret")
    for name, value in (("ADDRESS", "127.0.0.1:1"), ("AUTH_MODE", "token"), ("AUTH_TOKEN_PATH", str(file))):
        monkeypatch.setenv(f"RAY_{name}", value)


@pytest.mark.usefixtures("token")
def test_a_head_that_is_still_to_come_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "POLL_S", 0.01)
    with pytest.raises(ConnectionError, match=r"nobody listens at 127.0.0.1:1 "):
        ray_cluster.wait_for_nodes(1, 0.05)


@pytest.mark.usefixtures("token")
def test_nodes_that_are_missing_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "NodeManagerAddress": "10.0.0.1"}, {"Alive": False, "NodeManagerAddress": "10.0.0.2"}]
    ended: list[bool] = []
    monkeypatch.setattr(ray_cluster, "ask_head", lambda address: "id")
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **_: None)
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray_cluster.ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setattr(ray_cluster, "POLL_S", 0.01)
    with pytest.raises(TimeoutError, match=r"1 of 2 Ray nodes are there after 0.03 s: 10.0.0.1"):
        ray_cluster.wait_for_nodes(2, 0.03)
    assert ray_cluster.wait_for_nodes(1, 0.03) == ["10.0.0.1"]
    assert ended == [True, True]
