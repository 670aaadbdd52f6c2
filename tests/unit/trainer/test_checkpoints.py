"""What a run saves: the driver's state bit for bit; how policy and store are asked for it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fipo_megatron.checkpoint.contents import describe_model
from fipo_megatron.checkpoint.manifest import DamagedError
from fipo_megatron.checkpoint.sample_groups import read_groups
from fipo_megatron.config.schema import Config
from fipo_megatron.trainer import checkpoints
from fipo_megatron.trainer.actor import WorkerError
from fipo_megatron.trainer.checkpoints import (
    Checkpoints,
    RunState,
    read_run_state,
    write_run_state,
)
from tests.unit.checkpoint.test_contents import write_model_folder
from tests.unit.checkpoint.test_sample_groups import GROUPS, assert_same

VALUES = {"generation_batches": 7, "prompts": {"order": [3, 1], "seen": 0.1 + 0.2}, "steps_without_spread": 0}


# ---------------------------------------------------------------- the driver's state


@pytest.mark.parametrize("draws", [0, 1, 625])
def test_a_state_comes_back_with_every_bit_and_its_random_generators(draws: int, tmp_path: Path) -> None:
    random.seed(draws)
    np.random.seed(draws)
    [random.gauss(0, 1) for _ in range(draws)]  # an odd number leaves a half-used pair behind, in both
    np.random.normal(size=draws)
    write_run_state(RunState(12, VALUES, tuple(GROUPS)), tmp_path)
    expected = [random.gauss(0, 1), random.random(), *np.random.normal(size=3), *np.random.randint(0, 1 << 30, 700)]
    random.seed(99)
    np.random.seed(99)
    found = read_run_state(tmp_path)
    drawn = [random.gauss(0, 1), random.random(), *np.random.normal(size=3), *np.random.randint(0, 1 << 30, 700)]
    assert drawn == expected
    assert (found.step, found.values) == (12, VALUES)
    assert len(found.groups) == len(GROUPS)
    for group, original in zip(found.groups, GROUPS, strict=True):
        assert_same(group, original)


def drop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("format"), r"KeyError\('format'\)"),
        (drop("step"), r"KeyError\('step'\)"),
        (drop("random"), r"KeyError\('random'\)"),
        (lambda values: values.update(format=2), "format = 2, must be 1: it is of another version"),
        (lambda values: values.update(random={"python": 3, "numpy": 4}), "TypeError"),
    ],
)
def test_an_unusable_state_is_refused_by_name(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    write_run_state(RunState(12, VALUES, ()), tmp_path)
    values = json.loads((tmp_path / "run.json").read_text())
    change(values)
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(DamagedError, match=rf"run.json can't be read \(.*{message}.*; use another checkpoint"):
        read_run_state(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_what_is_no_state_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DamagedError, match="run.json can't be read"):
        read_run_state(tmp_path)


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_run_state(RunState(1, {"loss": float("nan")}, ()), tmp_path)


# ---------------------------------------------------------------- which model


# ---------------------------------------------------------------- policy and store


class RecordedPolicy:
    """Keeps the order of the calls, and writes when it is let."""

    def __init__(self, num_polls: float = 0, failing: str = "") -> None:
        self.calls: list[str] = []
        self.written = ["weights"]
        self._num_polls, self._failing = num_polls, failing

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._failing:
            raise RuntimeError(f"{name}: no space left on device")

    async def begin_save(self, folder: Path) -> None:
        self._call("begin_save")
        assert [path.name for path in sorted(folder.parent.iterdir())] == ["groups.safetensors", "policy", "run.json"]
        assert not any(folder.iterdir())
        (folder / "weights").write_text(folder.parent.name)

    async def is_save_written(self) -> bool:
        self._call("is_save_written")
        self._num_polls -= 1
        return self._num_polls < 0

    async def finish_save(self) -> list[str]:
        self._call("finish_save")
        return self.written

    async def offload(self) -> None:
        self._call("offload")


def make_checkpoints(
    folder: Path, policy: RecordedPolicy, trainer: dict[str, Any] | None = None, call_s: float = 60, **settings: Any
) -> Checkpoints:
    config = Config.model_validate(
        {
            "warm_start": {},
            "checkpoint": {"every_steps": 4, **settings},
            "trainer": {"steps": 10, **(trainer or {})},
            "timeouts": {"call_s": call_s},
        }
    )
    any_policy: Any = policy
    return Checkpoints(config, folder, any_policy, write_model_folder(folder / "model"))


def states(*steps: int) -> list[RunState]:
    return [RunState(step, VALUES, tuple(GROUPS[:1])) for step in steps]


@pytest.fixture(autouse=True)
def asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "POLL_S", 0.001)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def test_a_checkpoint_is_due_every_so_many_steps_and_after_the_last(tmp_path: Path) -> None:
    (tmp_path / "never").mkdir()
    saved = make_checkpoints(tmp_path, RecordedPolicy())
    assert [step for step in range(1, 11) if saved.is_due(step)] == [4, 8, 10]
    never = make_checkpoints(tmp_path / "never", RecordedPolicy(), every_steps=0)
    assert not any(never.is_due(step) for step in range(1, 11))


def test_training_goes_on_while_the_files_are_written(tmp_path: Path) -> None:
    policy = RecordedPolicy(num_polls=3)
    saved = make_checkpoints(tmp_path, policy)

    async def train() -> None:
        (state,) = states(4)
        await saved.save(state, score=0.25)
        assert policy.calls == ["begin_save"]
        assert saved.store.steps() == []
        saved.check()
        await saved.finish()

    run(train())
    assert policy.calls == ["begin_save", *["is_save_written"] * 4, "finish_save"]
    found = saved.store.newest()
    assert found is not None
    assert (found.step, found.manifest["score"], found.manifest["layout"]["tensor"]) == (4, 0.25, 1)
    assert found.manifest["model"] == json.loads(json.dumps(describe_model(tmp_path / "model")))
    assert found.manifest["config"]["checkpoint"]["every_steps"] == 4
    assert (found.folder / "policy/weights").read_text().startswith("step-00000004.partial-")
    assert len(read_groups(found.folder / "groups.safetensors")) == 1


def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    policy = RecordedPolicy(num_polls=2)
    saved = make_checkpoints(tmp_path, policy)

    async def train() -> None:
        for state in states(4, 8):
            await saved.save(state, score=None)
        assert saved.store.steps() == [4]
        await saved.finish()
        await saved.finish()

    run(train())
    one, other = (
        ["begin_save", *["is_save_written"] * 3, "finish_save"],
        ["begin_save", "is_save_written", "finish_save"],
    )
    assert policy.calls == one + other
    assert saved.store.steps() == [4, 8]


def test_one_that_is_not_asynchronous_is_whole_when_save_returns(tmp_path: Path) -> None:
    policy = RecordedPolicy(num_polls=1)
    saved = make_checkpoints(tmp_path, policy, trainer={"offload": True}, asynchronous=False)

    async def train() -> None:
        await saved.save(*states(4), score=None)
        assert saved.store.steps() == [4]

    run(train())
    assert policy.calls == ["begin_save", "offload", "is_save_written", "is_save_written", "finish_save"]


async def check(saved: Checkpoints) -> None:
    saved.check()


async def save_next(saved: Checkpoints) -> None:
    await saved.save(*states(8), score=None)


@pytest.mark.parametrize("failing", ["is_save_written", "finish_save"])
@pytest.mark.parametrize("notice", [check, Checkpoints.finish, save_next])
def test_a_failed_write_is_raised_once_and_at_the_next_step(
    failing: str, notice: Callable[[Checkpoints], Awaitable[None]], tmp_path: Path
) -> None:
    saved = make_checkpoints(tmp_path, RecordedPolicy(failing=failing))

    async def train() -> None:
        await saved.save(*states(4), score=None)
        await asyncio.sleep(0.05)
        with pytest.raises(RuntimeError, match=f"{failing}: no space left on device"):
            await notice(saved)
        saved.check()
        await saved.finish()

    run(train())
    assert saved.store.steps() == []
    (left,) = saved.store.folder.iterdir()
    assert left.name.startswith("step-00000004.partial-")


def test_a_store_that_fails_is_raised_and_the_one_before_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = make_checkpoints(tmp_path, RecordedPolicy(), asynchronous=False)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    async def train() -> None:
        one, other = states(4, 8)
        await saved.save(one, score=None)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(RuntimeError, match="No space left.*bytes free"):
            await saved.save(other, score=None)

    run(train())
    assert saved.store.steps() == [4]
    found = saved.store.newest()
    assert found is not None
    assert (found.step, found.refused) == (4, ())


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["__1_0.distcp", "weights"], r"policy/__1_0.distcp was written by a rank and is not there \(1 in all\)"),
        ([], r"policy/weights was written by no rank \(1 in all\)"),
    ],
)
def test_files_that_the_driver_sees_otherwise_than_the_ranks_are_no_checkpoint(
    written: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "VISIBLE_S", 0.02)
    policy = RecordedPolicy()
    saved, policy.written = make_checkpoints(tmp_path, policy), written

    async def train() -> None:
        await saved.save(*states(4), score=None)
        with pytest.raises(RuntimeError, match=message + "; is checkpoint.folder on a file system that all nodes"):
            await saved.finish()

    run(train())
    assert saved.store.steps() == []


def test_files_that_come_late_are_waited_for(tmp_path: Path) -> None:
    policy = RecordedPolicy()
    saved, policy.written = make_checkpoints(tmp_path, policy), ["late", "weights"]

    async def train() -> None:
        await saved.save(*states(4), score=None)
        await asyncio.sleep(0.02)
        assert saved.store.steps() == []
        (partial,) = (tmp_path / "checkpoints").glob("step-00000004.partial-*")
        (partial / "policy/late").write_text("here")
        await saved.finish()

    run(train())
    assert saved.store.steps() == [4]


@pytest.mark.parametrize("failing", ["finish_save", "complete", "write"])
def test_a_checkpoint_that_finds_no_room_says_how_much_there_is_and_what_to_do(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = make_checkpoints(tmp_path, RecordedPolicy(failing=failing), keep_last=3, keep_best=2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "weights")

    if failing == "complete":
        monkeypatch.setattr(saved.store, "complete", full)
    elif failing == "write":
        monkeypatch.setattr(checkpoints, "write_run_state", full)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=12_345_678))

    async def train() -> None:
        await saved.save(*states(4), score=None)
        await saved.finish()

    with pytest.raises(RuntimeError, match=r"(?i)the checkpoint of step 4 was not written: .*no space left") as raised:
        run(train())
    assert f"{tmp_path / 'checkpoints'} has 12,345,678 bytes free; make room for 6 checkpoints" in str(raised.value)
    assert "checkpoint.keep_last = 3" in str(raised.value)
    assert "another checkpoint.folder" in str(raised.value)


def test_a_rank_that_died_is_no_matter_of_room(tmp_path: Path) -> None:
    policy = RecordedPolicy()
    saved = make_checkpoints(tmp_path, policy)

    async def died() -> list[str]:
        raise WorkerError("policy rank 1 died during finish_save")

    policy.finish_save = died  # type: ignore[method-assign]

    async def train() -> None:
        await saved.save(*states(4), score=None)
        await saved.finish()

    with pytest.raises(WorkerError, match="^policy rank 1 died during finish_save$"):
        run(train())


def test_a_policy_that_never_ends_writing_is_named_with_the_limit(tmp_path: Path) -> None:
    saved = make_checkpoints(tmp_path, RecordedPolicy(num_polls=1e9), call_s=0.05)

    async def train() -> None:
        await saved.save(*states(4), score=None)
        with pytest.raises(
            RuntimeError, match=r"step 4 was not written within timeouts.call_s = 0.05 s; is the file sys"
        ):
            await saved.finish()

    run(train())


def test_one_that_is_given_up_leaves_no_checkpoint(tmp_path: Path) -> None:
    policy = RecordedPolicy(num_polls=1e9)
    saved = make_checkpoints(tmp_path, policy)

    async def train() -> None:
        await saved.save(*states(4), score=None)
        await asyncio.sleep(0.01)
        await saved.cancel()
        num_calls = len(policy.calls)
        await asyncio.sleep(0.01)
        assert len(policy.calls) == num_calls
        await saved.cancel()

    run(train())
    assert saved.store.steps() == []


def test_one_whose_manifest_is_being_written_becomes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the folder would be removed while a thread writes into it."""
    saved = make_checkpoints(tmp_path, RecordedPolicy())
    begun, complete = threading.Event(), saved.store.complete

    def complete_slowly(*arguments: Any) -> Path:
        begun.set()
        time.sleep(0.1)
        return complete(*arguments)

    async def train() -> None:
        await saved.save(*states(4), score=None)
        await asyncio.to_thread(begun.wait, 10)
        await saved.cancel()
        assert saved.store.steps() == [4]

    monkeypatch.setattr(saved.store, "complete", complete_slowly)
    run(train())
