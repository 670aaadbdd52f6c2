"""The command that scripts wait with."""

from __future__ import annotations

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


@pytest.mark.parametrize("error", [TimeoutError("1 of 2 Ray nodes"), ConnectionError("no cluster")])
def test_a_cluster_that_is_not_whole_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def wait_for_nodes(*_: object) -> list[str]:
        raise error

    monkeypatch.setattr(ray_cluster, "wait_for_nodes", wait_for_nodes)
    assert wait_for_ray.main(["--nodes", "2"]) == 1
    assert capsys.readouterr().err == f"error: {error}\n"


def test_nodes_that_are_missing_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "NodeManagerAddress": "10.0.0.1"}, {"Alive": False, "NodeManagerAddress": "10.0.0.2"}]
    ended: list[bool] = []
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **_: None)
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray_cluster.ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setattr(ray_cluster, "POLL_S", 0.01)
    with pytest.raises(TimeoutError, match=r"1 of 2 Ray nodes are there after 0.03 s: 10.0.0.1"):
        ray_cluster.wait_for_nodes(2, 0.03)
    assert ray_cluster.wait_for_nodes(1, 0.03) == ["10.0.0.1"]
    assert ended == [True, True]
