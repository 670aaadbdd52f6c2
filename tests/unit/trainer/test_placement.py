"""The shared memory that a run asks for, and who has the devices when they are shared."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fipo_megatron.config.schema import Config, RolloutConfig
from fipo_megatron.observability.timers import SpanRecorder
from fipo_megatron.rollout.replicas import Replicas
from fipo_megatron.trainer.actor import EngineClient
from fipo_megatron.trainer.placement import MIN_OBJECT_STORE_BYTES, TOKEN_BYTES, Workers, object_store_bytes
from fipo_megatron.types import Generation, TrainingBatch


def test_a_token_takes_the_bytes_of_all_its_arrays() -> None:
    generation = Generation(np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", 0)
    batch = TrainingBatch(*np.zeros((3, 1), np.int64), *np.zeros((3, 1), np.float32))  # all arrays, one token each
    arrays = (generation.token_ids, generation.logprobs, batch.token_ids, batch.old_logprobs, batch.ref_logprobs)
    assert sum(array.nbytes for array in arrays if array is not None) == TOKEN_BYTES


def test_the_longest_batch_of_a_recipe_fits_and_a_small_run_asks_for_little() -> None:
    recipe = RolloutConfig(
        prompts_per_step=512, samples_per_prompt=16, max_prompt_tokens=2048, max_response_tokens=20480
    )
    assert object_store_bytes(recipe) == 3 * 24 * 8192 * 22528  # 12.4 GiB
    small = RolloutConfig(prompts_per_step=32, samples_per_prompt=8, max_prompt_tokens=16, max_response_tokens=48)
    assert object_store_bytes(small) == MIN_OBJECT_STORE_BYTES == 256 * 1024 * 1024


def test_ray_is_started_again_where_a_busy_machine_was_too_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[str] = ["The current node timed out during startup.", "The current node timed out during startup."]

    def init(**_: Any) -> None:
        if answers:
            raise Exception(answers.pop())

    monkeypatch.setattr("ray.init", init)
    workers = Workers(Config.model_validate({"platform": "cpu"}), Path("/nowhere"))
    workers._foreign, workers._temp_dir = set(psutil.Process().children(recursive=True)), "/nowhere"
    workers._init_ray("127.0.0.1")
    assert answers == []
    assert capsys.readouterr().err.count("Starting it again") == 2
    answers.append("no memory")
    with pytest.raises(Exception, match="no memory"):
        workers._init_ray("127.0.0.1")
    workers.config = Config.model_validate({"platform": "cpu", "timeouts": {"startup_s": 1e-9}})
    answers.append("The current node timed out during startup.")
    with pytest.raises(Exception, match="timed out during startup"):
        workers._init_ray("127.0.0.1")


class Recorder:
    """Policy, engines and their sync: writes down what is asked of them."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any) -> dict[str, float]:
            if method != "ready":
                self.calls.append(" ".join([self.name, method, *map(str, arguments)]))
            return {"sync/sent_gib": 1.0}

        return call


def make_workers(mode: str, calls: list[str]) -> Workers:
    values = {"platform": "cpu", "placement": {"mode": mode}, "trainer": {"offload": mode == "colocated"}}
    workers = Workers(Config.model_validate(values), Path("/nowhere"))
    stand_ins: Any = [Recorder(name, calls) for name in ("policy", "sync", "engine 0", "engine 1")]
    workers.policy, workers._sync, *workers._engines = stand_ins
    return workers


async def make_two_steps(workers: Workers, calls: list[str]) -> dict[str, float]:
    """As the loop does: an evaluation before the first step, a checkpoint after it."""
    metrics = await workers.sync_weights(0)
    for step in (1, 2):
        for phase in ("evaluation", "rollout") if step == 1 else ("rollout",):
            async with workers.sampling():
                calls.append(phase)
        calls.append("train")
        await workers.sync_weights(step)
        calls.append("save")
    return metrics


def test_engines_and_policy_take_turns_on_shared_devices() -> None:
    """Weights are pushed while the cache has no memory; anew after an evaluation, whose end gave them up."""
    calls: list[str] = []
    metrics = asyncio.run(make_two_steps(make_workers("colocated", calls), calls))
    assert metrics == {"sync/sent_gib": 1.0}

    def both(call: str) -> list[str]:
        return [f"engine 0 {call}", f"engine 1 {call}"]

    def push(version: int) -> list[str]:
        return ["policy offload", *both("resume_memory weights"), f"sync sync {version}", "policy offload"]

    def sample(phase: str) -> list[str]:
        return [*both("resume_memory kv_cache"), phase, *both("release_memory")]

    assert calls == [
        *(*push(0), "policy offload", *sample("evaluation")),
        *(*push(0), *sample("rollout"), "train"),
        *(*push(1), "save", "policy offload", *sample("rollout"), "train"),  # what the save has brought back leaves
        *(*push(2), "save"),
    ]


def test_engines_on_devices_of_their_own_are_left_alone() -> None:
    calls: list[str] = []
    asyncio.run(make_two_steps(make_workers("disaggregated", calls), calls))
    steps = [["rollout", "train", f"sync sync {step}", "save"] for step in (1, 2)]
    assert calls == ["sync sync 0", "evaluation", *steps[0], *steps[1]]


def test_engines_keep_what_a_failure_left_in_them() -> None:
    calls: list[str] = []
    workers = make_workers("colocated", calls)

    async def fail() -> None:
        await workers.sync_weights(0)
        async with workers.sampling():
            raise RuntimeError("a judge failed")

    with pytest.raises(RuntimeError, match="a judge failed"):
        asyncio.run(fail())
    assert "engine 0 release_memory" not in calls  # one that died would hide the cause


def test_a_rebuilt_engine_is_recorded_like_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = make_workers("disaggregated", [])
    workers.engine = Replicas([EngineClient(None, workers.config.timeouts) for _ in range(2)])
    workers.engine.engines[1].recorder = recorder = SpanRecorder()
    workers._engines = workers.engine.engines
    monkeypatch.setattr("ray.kill", lambda actor: None)
    monkeypatch.setattr(workers, "_start_engine", lambda replica: EngineClient(None, workers.config.timeouts))
    assert workers._restart_engine(1).recorder is workers.engine.engines[1].recorder is recorder
    assert workers._restart_engine(0).recorder is None
