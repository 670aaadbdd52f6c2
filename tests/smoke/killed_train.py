"""tools/train.py that kills itself in the middle of a phase, as `kill -9` does; `phase@step` is in KILL."""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fipo_megatron.reward.judge import JudgeWithLimit
from fipo_megatron.trainer.actor import EngineClient, PolicyClient
from fipo_megatron.trainer.run import Run

PHASE, _, STEP = os.environ["KILL"].partition("@")
AHEAD_S = 0.02  # by which the workers have begun what the driver will not see the end of
now = {"step": 0, "updates": 0}


def die(phase: str, step: int | None = None) -> None:
    if phase == PHASE and (now["step"] if step is None else step) == int(STEP):
        os.kill(os.getpid(), signal.SIGKILL)


collect_groups, generate, judge = Run.collect_groups, EngineClient.generate, JudgeWithLimit.__call__
rename = os.rename
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

    async def call(self: Any, *arguments: Any, **settings: Any) -> Any:
        task = asyncio.ensure_future(method(self, *arguments, **settings))
        await asyncio.sleep(AHEAD_S)
        if now["updates"] >= min_updates:
            die(phase)
        now["updates"] += method is update
        return await task

    return call


def die_before_rename(source: Path, target: Path) -> None:
    if Path(source).name.startswith(f"step-{int(STEP):08d}.partial"):
        die("save_before_rename", int(STEP))
    rename(source, target)


if __name__ == "__main__":
    Run.collect_groups = count_steps  # type: ignore[method-assign]
    EngineClient.generate = die_in_rollout  # type: ignore[method-assign]
    JudgeWithLimit.__call__ = die_in_reward  # type: ignore[method-assign]
    PolicyClient.logprobs = begun(logprobs, "logprobs")  # type: ignore[method-assign]
    PolicyClient.update = begun(update, "train", min_updates=1)  # type: ignore[method-assign]
    EngineClient.update_weights = begun(update_weights, "sync")  # type: ignore[method-assign]
    Run.evaluate = begun(Run.evaluate, "evaluate")  # type: ignore[method-assign]
    PolicyClient.begin_save = begun(PolicyClient.begin_save, "save")  # type: ignore[method-assign]
    os.rename = die_before_rename  # type: ignore[assignment]
    runpy.run_path(str(Path(__file__).parents[2] / "tools" / "train.py"), run_name="__main__")
