"""tools/train.py that kills itself in the middle of a phase, as `kill -9` does; `phase@step` is in KILL."""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fipo_megatron.checkpoint import store
from fipo_megatron.reward.judge import JudgeWithLimit
from fipo_megatron.trainer.actor import EngineClient, PolicyClient
from fipo_megatron.trainer.run import Run

PHASE, _, STEP = os.environ["KILL"].partition("@")
AHEAD_S = 0.02  # by which the workers have begun what the driver will not see the end of
now = {"step": 0, "updates": 0}


def die(phase: str) -> None:
    if phase == PHASE and now["step"] == int(STEP):
        os.kill(os.getpid(), signal.SIGKILL)


collect_groups, generate, judge = Run.collect_groups, EngineClient.generate, JudgeWithLimit.__call__
logprobs, update, update_weights = PolicyClient.logprobs, PolicyClient.update, EngineClient.update_weights


async def count_steps(self: Run, version: int) -> Any:
    now.update(step=version + 1, updates=0)
    return await collect_groups(self, version)


async def die_in_rollout(self: EngineClient, *arguments: Any) -> AsyncIterator[Any]:
    async for response in generate(self, *arguments):
        yield response
        die("rollout")


def die_in_reward(self: JudgeWithLimit, *arguments: Any) -> Any:
    judgements = judge(self, *arguments)
    die("reward")
    return judgements


def begun(method: Callable[..., Any], phase: str, min_updates: int = 0) -> Callable[..., Any]:
    """The method, whose call is begun before the driver dies."""

    async def call(self: Any, *arguments: Any) -> Any:
        task = asyncio.ensure_future(method(self, *arguments))
        await asyncio.sleep(AHEAD_S)
        if now["updates"] >= min_updates:
            die(phase)
        now["updates"] += method is update
        return await task

    return call


def at(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """The method, before which the driver dies."""

    def call(*arguments: Any, **settings: Any) -> Any:
        die(phase)
        return method(*arguments, **settings)

    return call


if __name__ == "__main__":
    Run.collect_groups = count_steps  # type: ignore[method-assign]
    EngineClient.generate = die_in_rollout  # type: ignore[method-assign]
    JudgeWithLimit.__call__ = die_in_reward  # type: ignore[method-assign]
    PolicyClient.logprobs = begun(logprobs, "logprobs")  # type: ignore[method-assign]
    PolicyClient.update = begun(update, "train", min_updates=1)  # type: ignore[method-assign]
    EngineClient.update_weights = begun(update_weights, "sync")  # type: ignore[method-assign]
    PolicyClient.begin_save = begun(PolicyClient.begin_save, "save")  # type: ignore[method-assign]
    store.write_manifest = at(store.write_manifest, "save_before_manifest")
    store.os = type("os", (), {**vars(os), "rename": staticmethod(at(os.rename, "save_before_rename"))})
    store.CheckpointStore._track = at(store.CheckpointStore._track, "save_before_tracker")  # type: ignore[method-assign]
    store.CheckpointStore._remove = at(store.CheckpointStore._remove, "save_before_prune")  # type: ignore[method-assign]
    runpy.run_path(str(Path(__file__).parents[2] / "tools" / "train.py"), run_name="__main__")
