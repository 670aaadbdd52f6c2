"""What becomes of a sync when an end fails: clients are scripted, the logic between them is the run's own."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.config.schema import Config, PlacementConfig
from fipo_megatron.reshard.engine_views import ViewsRefusedError
from fipo_megatron.reshard.execute import StaleWeightsError, WeightMismatchError
from fipo_megatron.reshard.layout import TrainerLayout, engine_layout
from fipo_megatron.reshard.session import WeightSession
from fipo_megatron.rollout.client import EngineUpdateError
from fipo_megatron.trainer.sync import WeightSync, make_session, pick_transport
from fipo_megatron.types import TransferCost
from tests.unit.reshard.shapes import QWEN2_32B, small_shape

SHAPE = small_shape("Qwen3ForCausalLM")


class Policy:
    """Two ranks that send half of the minimum each."""

    def __init__(self, half_bytes: int, failure: Exception | None = None) -> None:
        self.half_bytes, self.failure = half_bytes, failure
        self.sessions: list[WeightSession] = []
        self.pushed: list[int] = []

    async def listen_for_engines(self) -> tuple[str, int]:
        return "10.0.0.7", 4321

    async def connect_engines(self, session: WeightSession) -> None:
        self.sessions.append(session)

    async def push_weights(self, version: int) -> list[TransferCost]:
        self.pushed.append(version)
        if self.failure is not None:
            raise self.failure
        return [TransferCost(self.half_bytes, 0.1)] * 2


class Engine:
    def __init__(self, *failures: Exception | None, takes_shards: bool = True) -> None:
        self.failures, self.takes_shards = list(failures), takes_shards
        self.versions: list[int] = []

    async def ready(self) -> None: ...

    async def check_session(self, info: dict[str, Any]) -> None:
        if not self.takes_shards:
            raise ViewsRefusedError("lm_head.weight: packed")

    async def connect_weights(self, info: dict[str, Any]) -> None:
        session = WeightSession.from_info(info)[0]
        assert (session.address, session.port) == ("10.0.0.7", 4321)

    async def update_weights(self, info: dict[str, Any]) -> dict[str, float]:
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        self.versions.append(info["version"])
        return {"receive_s": 1.0 + len(self.versions), "verify_s": 0.5}


def make_sync(
    engines: list[Engine], failure: Exception | None = None, **settings: Any
) -> tuple[WeightSync, Policy, list[int]]:
    config = Config.model_validate({"model": {"dtype": "float32"}, "rollout": {"replicas": len(engines)}} | settings)
    session = WeightSession(
        SHAPE, TrainerLayout(tensor=2), engine_layout(config.rollout), "shared_memory", "127.0.0.1", 0, "", 1.0, 1, True
    )
    policy = Policy(session.make_plan().minimum_elements * 4 // 2, failure)
    restarted: list[int] = []

    def restart(replica: int) -> Any:
        restarted.append(replica)
        return Engine()

    return WeightSync(config, session, policy, engines, restart), policy, restarted  # type: ignore[arg-type]


def test_what_a_sync_took() -> None:
    engines = [Engine(), Engine()]
    sync, policy, restarted = make_sync(engines)
    metrics = asyncio.run(sync.sync(3))
    assert metrics == {
        "sync/sent_gib": 2 * policy.half_bytes / 2**30,
        "sync/sent_over_minimum": 1.0,
        "sync/receive_s": 2.0,
        "sync/verify_s": 0.5,
    }
    asyncio.run(sync.sync(4))
    assert [engine.versions for engine in engines] == [[3, 4], [3, 4]]
    assert len(policy.sessions) == 1  # met once
    assert restarted == []


def test_only_the_engine_that_failed_is_rebuilt_and_all_are_sent_the_weights_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good, bad = Engine(), Engine(RuntimeError("its worker died"))
    sync, policy, restarted = make_sync([good, bad])
    with caplog.at_level(logging.WARNING):
        metrics = asyncio.run(sync.sync(5))
    assert restarted == [1]
    assert metrics["sync/rebuilt_engines"] == 1
    assert policy.pushed == [5, 5]
    assert good.versions == [5, 5]
    assert len(policy.sessions) == 2  # everyone meets anew
    assert "RuntimeError: its worker died" in caplog.text


def test_an_engine_that_fails_again_ends_the_run() -> None:
    sync, _, restarted = make_sync([Engine()], ConnectionError("engine worker 0 died or stalled"))
    with pytest.raises(EngineUpdateError, match="engine worker 0 died or stalled"):
        asyncio.run(sync.sync(1))
    assert restarted == [0]


@pytest.mark.parametrize(
    "refusal", [WeightMismatchError("model.norm.weight"), StaleWeightsError("trainer rank 1 made 3")], ids=type
)
def test_wrong_weights_end_the_run_at_once(refusal: Exception) -> None:
    sync, _, restarted = make_sync([Engine(), Engine(refusal)])
    with pytest.raises(type(refusal), match=str(refusal)):
        asyncio.run(sync.sync(1))
    assert restarted == []


def test_a_rank_of_the_policy_that_fails_is_the_cause() -> None:
    sync, _, restarted = make_sync([Engine(RuntimeError("waited in vain"))], ValueError("a rank's own"))
    with pytest.raises(ValueError, match="a rank's own"):
        asyncio.run(sync.sync(1))
    assert restarted == []


def test_whole_tensors_are_no_way_out_on_a_shared_gpu() -> None:
    sync, policy, _ = make_sync([Engine(takes_shards=False)])
    sync.config = sync.config.model_copy(update={"placement": PlacementConfig(mode="colocated")})
    sync.session = replace(sync.session, transport="cuda_ipc")
    with pytest.raises(ViewsRefusedError, match="lm_head.weight") as refused:
        asyncio.run(sync.sync(0))
    assert "set placement.mode=disaggregated" in refused.value.__notes__[0]
    assert policy.sessions == []


def test_an_engine_that_takes_no_shards_is_sent_whole_tensors_and_this_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sync, policy, _ = make_sync([Engine(takes_shards=False)])
    with caplog.at_level(logging.WARNING):
        asyncio.run(sync.sync(0))
    assert [session.transport for session in policy.sessions] == ["broadcast"]
    assert "lm_head.weight: packed" in caplog.text

    asked_for, _, _ = make_sync([Engine(takes_shards=False)], sync={"transport": "collective"})
    with pytest.raises(ViewsRefusedError, match="lm_head.weight"):
        asyncio.run(asked_for.sync(0))


@pytest.mark.parametrize("transport", ["disk", "disk_delta"])
def test_engines_read_what_is_on_disk_when_the_policy_has_written_it(transport: str) -> None:
    engine = Engine()
    sync, policy, restarted = make_sync([engine])
    sync.session = replace(sync.session, transport=transport)
    order: list[str] = []

    async def push(version: int) -> list[TransferCost]:
        order.append("begins to write")
        await asyncio.sleep(0.02)
        order.append("has written")
        if version == 2:
            raise OSError("No space left on device")
        return [TransferCost(1, 0.0)]

    async def update(info: dict[str, Any]) -> dict[str, float]:
        order.append("reads")
        return {"receive_s": 0.0, "verify_s": 0.0}

    policy.push_weights, engine.update_weights = push, update  # type: ignore[method-assign]
    asyncio.run(sync.sync(1))
    assert order == ["begins to write", "has written", "reads"]
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(sync.sync(2))
    assert order[3:] == ["begins to write", "has written"]
    assert restarted == []


def test_transport_of_a_configuration(tmp_path: Path) -> None:
    config = Config()
    assert pick_transport(config, on_cpu=True) == "shared_memory"
    assert pick_transport(config, on_cpu=False) == "collective"
    shared = config.model_copy(update={"placement": PlacementConfig(mode="colocated")})
    assert pick_transport(shared, on_cpu=True) == "shared_memory"
    assert pick_transport(shared, on_cpu=False) == "cuda_ipc"
    elsewhere = Config.model_validate({"cluster": {"address": "10.0.0.1"}})
    assert pick_transport(elsewhere, on_cpu=True) == "collective"
    joined = Config.model_validate({"cluster": {"ray_address": "127.0.0.2:6379"}})
    assert pick_transport(joined, on_cpu=True) == "collective"
    asked_for = Config.model_validate({"sync": {"transport": "disk", "folder": str(tmp_path)}})
    assert pick_transport(asked_for, on_cpu=True) == "disk"

    (tmp_path / "config.json").write_text(json.dumps(QWEN2_32B))
    on_disk = make_session(asked_for, tmp_path, True, Path("/sockets"), Path("/runs/a"))
    assert Path(on_disk.folder).parent == tmp_path
    assert Path(on_disk.folder).name.startswith("weights-a-")
    assert on_disk.folder != make_session(asked_for, tmp_path, True, Path("/sockets"), Path("/runs/a")).folder
    assert make_session(config, tmp_path, True, Path("/sockets"), Path("/runs/a")).folder == "/sockets"
