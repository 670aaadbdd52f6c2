"""What a run saves to go on from: the policy's state, and what the driver holds; when, and while training goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fipo_megatron.checkpoint.contents import GROUPS, POLICY, RUN, describe_model
from fipo_megatron.checkpoint.manifest import DamagedError, naming
from fipo_megatron.checkpoint.sample_groups import read_groups, write_groups
from fipo_megatron.checkpoint.store import CheckpointStore
from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.actor import PolicyClient, WorkerError
from fipo_megatron.trainer.run_folder import checkpoints_folder
from fipo_megatron.types import SampleGroup

FORMAT = 1  # of run.json
POLL_S = 0.2
VISIBLE_S = 60.0  # how long the driver waits to see what ranks on other nodes have written


@dataclass(frozen=True)
class RunState:
    """What the driver holds after a step."""

    step: int
    values: dict[str, Any]  # of JSON's types, by whose they are
    groups: tuple[SampleGroup, ...]  # judged, and not trained on yet


def write_run_state(state: RunState, folder: Path) -> None:
    """Write a state to a checkpoint's folder, with the driver's global random generators."""
    values = {"format": FORMAT, "step": state.step, **state.values, "random": _random_state()}
    with naming(folder / RUN):
        (folder / RUN).write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
    write_groups(folder / GROUPS, state.groups)


def read_run_state(folder: Path) -> RunState:
    """The state in a checkpoint's folder; the driver's global random generators go on from there.

    Raises:
        DamagedError: it can't be read.
    """
    try:
        values = json.loads((folder / RUN).read_text(encoding="utf-8"))
        found, step = values.pop("format"), values.pop("step")
        if found != FORMAT:
            raise ValueError(f"format = {found!r}, must be {FORMAT}: it is of another version of this project")
        _set_random_state(values.pop("random"))
        return RunState(step, values, tuple(read_groups(folder / GROUPS)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / RUN} can't be read ({error!r}); use another checkpoint") from error


class Checkpoints:
    """Saves a run's checkpoints. One at a time is written, while training goes on."""

    def __init__(self, config: Config, run_folder: Path, policy: PolicyClient, model_folder: Path) -> None:
        settings = config.checkpoint
        self.config = config
        self.store = CheckpointStore(checkpoints_folder(config, run_folder), settings.keep_last, settings.keep_best)
        self._policy = policy
        self._model = describe_model(model_folder)
        self._pending: asyncio.Task[None] | None = None

    def is_due(self, step: int) -> bool:
        """Whether `checkpoint.every_steps` asks for one after this step."""
        every = self.config.checkpoint.every_steps
        return every > 0 and (step % every == 0 or step == self.config.trainer.steps)

    async def save(self, state: RunState, score: float | None) -> None:
        """Begin to save, when the one before is written; with `checkpoint.asynchronous=false` also end it.

        `score` is the held-out accuracy after the step, None if it was not measured.

        Raises:
            RuntimeError: this one or the one before could not be written; where that may be for want of room, it says
                how much there is and what to do.
        """
        await self.finish()
        with self._naming_room(state.step):
            folder = self.store.partial(state.step)
            write_run_state(state, folder)
            (folder / POLICY).mkdir()
        await self._policy.begin_save(folder / POLICY)
        if self.config.trainer.offload:
            await self._policy.offload()
        self._pending = asyncio.create_task(self._complete(state.step, score, folder))
        if not self.config.checkpoint.asynchronous:
            await self.finish()

    def check(self) -> None:
        """Raises what the writing of a checkpoint has failed with meanwhile."""
        if self._pending is not None and self._pending.done():
            pending, self._pending = self._pending, None
            pending.result()

    async def finish(self) -> None:
        """Wait until the checkpoint under way, if any, is on the disk."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            await pending

    async def cancel(self) -> None:
        """Give up the checkpoint under way, if any; nothing is written to it when this returns. One of which only the
        manifest was missing becomes whole."""
        if self._pending is not None:
            self._pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):  # the run has ended by something else
                await self._pending
            self._pending = None

    async def _complete(self, step: int, score: float | None, folder: Path) -> None:
        deadline = time.monotonic() + self.config.timeouts.call_s
        # Asked again and again, since to wait in the ranks would keep them from training.
        while not await self._policy.is_save_written():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the checkpoint of step {step} was not written within timeouts.call_s = "
                    f"{self.config.timeouts.call_s:g} s; is the file system of {self.store.folder} slow or stuck?"
                )
            await asyncio.sleep(POLL_S)
        with self._naming_room(step):
            written = await self._policy.finish_save()
        await self._see(written, folder / POLICY)
        details = {
            "layout": self.config.parallel.model_dump(mode="json"),
            "model": self._model,
            "config": self.config.model_dump(mode="json"),
        }
        # In a thread, since it reads all files for their hashes; one that has begun can't be given up.
        completing = asyncio.ensure_future(asyncio.to_thread(self.store.complete, step, details, score))
        try:
            with self._naming_room(step):
                await asyncio.shield(completing)
        except asyncio.CancelledError:
            await asyncio.wait([completing])
            raise

    async def _see(self, written: Sequence[str], folder: Path) -> None:
        """Return when the driver sees the files that the ranks wrote to a folder, and no other.

        Raises:
            RuntimeError: it does not within `VISIBLE_S`; network file systems may take that long.
        """
        deadline = time.monotonic() + VISIBLE_S
        while differing := {path.name for path in folder.iterdir()} ^ set(written):
            if time.monotonic() > deadline:
                name = min(differing)
                raise RuntimeError(
                    f"{folder / name} "
                    + ("was written by a rank and is not there" if name in written else "was written by no rank")
                    + f" ({len(differing)} in all); is checkpoint.folder on a file system that all nodes share?"
                )
            await asyncio.sleep(POLL_S)

    @contextlib.contextmanager
    def _naming_room(self, step: int) -> Iterator[None]:
        """Let a failure to write say how much room there is, and how to get more."""
        try:
            yield
        except WorkerError:  # a dead or silent rank: no matter of room
            raise
        except (OSError, RuntimeError) as error:
            settings = self.config.checkpoint
            kept = settings.keep_last + settings.keep_best
            folder = next(each for each in (self.store.folder, *self.store.folder.parents) if each.is_dir())
            raise RuntimeError(
                f"the checkpoint of step {step} was not written: {error}. {folder} has {_free_bytes(folder)} bytes "
                f"free; make room for {kept + 1} checkpoints, lower checkpoint.keep_last = {settings.keep_last} or "
                f"checkpoint.keep_best = {settings.keep_best}, or give another checkpoint.folder"
            ) from error


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number of"


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert not isinstance(keys, str)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))
