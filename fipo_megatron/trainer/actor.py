"""Awaitable clients of the actors that hold policy and engine. With placement.py the only users of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError

from fipo_megatron.config.schema import OptimizerConfig, TimeoutsConfig
from fipo_megatron.model.platform import peak_resident_bytes
from fipo_megatron.observability.timers import SpanRecorder
from fipo_megatron.parallel.packed import ResponseRows, merge_response_rows
from fipo_megatron.reshard.session import WeightSession
from fipo_megatron.rollout.client import EngineMemory
from fipo_megatron.types import (
    FinishedResponse,
    GenerationRequest,
    PolicyUpdate,
    SamplingSettings,
    TrainingBatch,
    TransferCost,
)

if TYPE_CHECKING:  # a policy's rank, which the driver need not import
    from fipo_megatron.trainer.profiled_policy import ProfileSettings, RankProfile

MAX_CAUSE_CHARS = 400
GRACE_S = 5.0  # after a first failure: how long the others may take to name theirs, which may be the cause


class WorkerError(RuntimeError):
    """A worker failed, died or stalled; the message names the likeliest cause."""


class PolicyClient:
    """All ranks of the policy: every call goes to every rank, since most are collective."""

    def __init__(self, actors: Sequence[Any], timeouts: TimeoutsConfig) -> None:
        self.actors = {f"policy rank {rank}": actor for rank, actor in enumerate(actors)}
        self.timeouts = timeouts
        self.recorder: SpanRecorder | None = None  # of the calls, in a profile

    async def connect(self) -> None:
        """Form the trainer's process groups, once every rank is up."""
        await self._call("__ray_ready__", timeout_s=self.timeouts.startup_s)
        (rendezvous,) = await self._call("rendezvous", first_only=True, timeout_s=self.timeouts.startup_s)
        await self._call("connect", *rendezvous, timeout_s=self.timeouts.startup_s)

    async def load(self, folder: Path, optimizer: OptimizerConfig, random_seed: int | None = None) -> None:
        """Build model and optimizer from a Hugging Face folder."""
        await self._call("load", folder, optimizer, random_seed, timeout_s=self.timeouts.startup_s)

    async def describe_kernels(self) -> str:
        """What the ranks compute log-probs and future-KL with."""
        return (await self._call("describe_kernels", first_only=True))[0]

    def put(self, batch: TrainingBatch) -> ray.ObjectRef:
        """A handle of the batch in shared memory, for the calls below: it is sent once, not once a call and rank."""
        return ray.put(batch)

    async def logprobs(self, batch: ray.ObjectRef) -> np.ndarray:
        """float32 [R], the policy's log-probs of every response token, in sample order."""
        return self._join(await self._call("logprobs", batch))

    async def ref_logprobs(self, batch: ray.ObjectRef) -> np.ndarray:
        """float32 [R], those of the frozen reference policy."""
        return self._join(await self._call("ref_logprobs", batch))

    async def update(self, batch: ray.ObjectRef, samples: Sequence[int], lr: float) -> PolicyUpdate:
        """One optimizer step over the mini-batch of these samples; its memory is that of the rank that took most."""
        replies = await self._call("update", batch, samples, lr)
        return max(replies, key=lambda update: update.cost.peak_memory_bytes)

    async def supervised_update(self, batch: TrainingBatch, lr: float) -> float:
        """Mean negative log-likelihood of one supervised optimizer step over the whole batch."""
        return (await self._call("supervised_update", ray.put(batch), range(batch.num_samples), lr))[0]

    async def export(self, source: Path, target: Path) -> None:
        """Write a Hugging Face folder."""
        await self._call("export", source, target)

    async def listen_for_engines(self) -> tuple[str, int]:
        """Address and port where rank 0 will meet the engines' workers."""
        return (await self._call("listen_for_engines", first_only=True))[0]

    async def connect_engines(self, session: WeightSession) -> None:
        """Meet the engines' workers; run it while the engines connect."""
        await self._call("connect_engines", session)

    async def push_weights(self, version: int) -> list[TransferCost]:
        """Send the weights to the engines, as `version`; run it while they receive. What it took, a rank each."""
        return await self._call("push_weights", version)

    async def begin_save(self, folder: Path) -> None:
        """Copy the policy's state to host memory, and begin to write it to a folder that all ranks share."""
        await self._call("begin_save", folder)

    async def is_save_written(self) -> bool:
        """Whether every rank has written its part, or failed to: then `finish_save` returns at once."""
        return all(await self._call("is_save_written"))

    async def finish_save(self) -> list[str]:
        """Wait for the files of all ranks; their names, relative to the folder, sorted.

        Raises:
            RuntimeError: a rank could not write.
        """
        return sorted({name for of_rank in await self._call("finish_save") for name in of_rank})

    async def load_state(self, folder: Path) -> bool:
        """Go on from a saved state; whether random generators start anew, since it is of another layout."""
        return any(await self._call("load_state", folder))

    async def random_states(self) -> list[dict[str, np.ndarray]]:
        """The random generators of every rank, uint8 arrays."""
        return await self._call("random_states")

    async def offload(self) -> None:
        """Move the policy to host memory until a call needs it."""
        await self._call("offload")

    async def begin_profile(self, settings: ProfileSettings) -> None:
        """Have ranks that are `ProfiledPolicy` record what they do."""
        await self._call("begin_profile", settings)

    async def end_profile(self, settings: ProfileSettings) -> list[RankProfile]:
        """What they have recorded, a rank each, once the traces are written and the pairs of gradients made.

        As long as that takes: `timeouts.call_s` is for the traces of one step, or of the run's end, and for a gradient.
        """
        await self._call("stop_recording", timeout_s=(settings.num_steps + 1) * self.timeouts.call_s)
        for _ in range(settings.num_pairs):
            await self._call("measure_pair", timeout_s=2 * self.timeouts.call_s)
        return await self._call("end_profile")

    async def _call(
        self, method: str, *args: Any, first_only: bool = False, timeout_s: float | None = None
    ) -> list[Any]:
        actors = dict(list(self.actors.items())[:1]) if first_only else self.actors
        with _recorded(self.recorder, method):
            refs = {name: getattr(actor, method).remote(*args) for name, actor in actors.items()}
            return await _gather(refs, method, timeout_s or self.timeouts.call_s)

    @staticmethod
    def _join(replies: Sequence[list[ResponseRows] | None]) -> np.ndarray:
        return merge_response_rows(part for reply in replies if reply is not None for part in reply)


class EngineClient:
    """An engine in an actor of its own: a RolloutClient."""

    def __init__(self, actor: Any, timeouts: TimeoutsConfig, name: str = "engine") -> None:
        self.actor = actor
        self.timeouts = timeouts
        self.name = name
        self.recorder: SpanRecorder | None = None  # of the calls, in a profile

    async def ready(self) -> None:
        """Return when the engine is up."""
        await self._call("__ray_ready__", timeout_s=self.timeouts.startup_s)

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> AsyncIterator[FinishedResponse]:
        """One response a request, in the order in which they are finished; `timeouts.call_s` is for each wait."""
        with _recorded(self.recorder, "generate"):
            stream = self.actor.generate.options(num_returns="streaming").remote(requests, sampling)
            while True:
                (finished,) = await _gather({self.name: _next_item(stream)}, "generate", self.timeouts.call_s)
                if finished is None:
                    return
                for response in finished:
                    yield response

    async def check_session(self, init_info: dict[str, Any]) -> None:
        """Return if the engine can take part in a `WeightSession`.

        Raises:
            ViewsRefusedError: it needs whole tensors.
        """
        await self._call("check_session", init_info)

    async def connect_weights(self, init_info: dict[str, Any]) -> None:
        """Meet the trainer's ranks."""
        await self._call("connect_weights", init_info)

    async def update_weights(self, update_info: dict[str, Any]) -> dict[str, float]:
        """Receive the weights that the trainer sends, and verify them; what it took."""
        start = time.time_ns()
        took = await self._call("update_weights", update_info)
        if self.recorder is not None:  # of the call's time the engine says what was what, in this order
            for name in ("receive_s", "verify_s"):
                end = start + round(took.get(name, 0.0) * 1e9)
                self.recorder.add(name.removesuffix("_s"), start, end)
                start = end
        return took

    async def release_memory(self) -> None:
        """Have the engine give its device's memory back, weights included."""
        await self._call("release_memory")

    async def resume_memory(self, *parts: EngineMemory) -> None:
        """Have it take parts of that again; the weights must be pushed next."""
        await self._call("resume_memory", parts)

    async def peak_memory_bytes(self) -> int:
        """The most host memory that its processes have had, added up."""
        return await self._call("__ray_call__", _peak_of_processes)

    async def _call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        with _recorded(self.recorder, method):
            ref = getattr(self.actor, method).remote(*args)
            return (await _gather({self.name: ref}, method, timeout_s or self.timeouts.call_s))[0]


def _peak_of_processes(_: Any) -> int:
    process, peak = psutil.Process(), peak_resident_bytes()
    for each in process.children(recursive=True):
        with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile
            peak += peak_resident_bytes(each.pid)
    return peak


def _recorded(recorder: SpanRecorder | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if recorder is None else recorder.span(name)


async def _gather(refs: dict[str, Awaitable[Any]], method: str, timeout_s: float) -> list[Any]:
    """Results in the order of `refs`.

    Raises:
        WorkerError: someone died, or did not answer within `timeout_s`.
        Exception: what the worker that caused the failure raised.
    """
    tasks = {name: asyncio.ensure_future(_result(ref)) for name, ref in refs.items()}
    _, pending = await asyncio.wait(tasks.values(), timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
    failures = {name: task.exception() for name, task in tasks.items() if task.done() and task.exception()}
    if not failures and not pending:
        return [task.result() for task in tasks.values()]
    if failures and pending:
        await asyncio.wait(pending, timeout=GRACE_S)
    silent = [name for name, task in tasks.items() if not task.done()]
    failures = {name: task.exception() for name, task in tasks.items() if task.done() and task.exception()}
    for name in silent:
        tasks[name].cancel()
    raise _cause(failures, silent, method, timeout_s)


async def _result(ref: Awaitable[Any]) -> Any:
    return await ref


async def _next_item(stream: ray.ObjectRefGenerator) -> Any:
    """The next item of a streaming call, None at its end."""
    try:
        return await (await anext(stream))
    except StopAsyncIteration:
        return None


def _cause(
    failures: dict[str, BaseException | None], silent: list[str], method: str, timeout_s: float
) -> BaseException:
    """What to raise when workers failed: a death, else an error of a worker's own, else a stall, else a lost peer."""
    causes = {name: _remote_cause(failure) for name, failure in failures.items()}
    for name, cause in causes.items():
        if isinstance(cause, RayActorError):
            verb = "did not start" if method == "__ray_ready__" else f"died during {method}"
            return WorkerError(f"{name} {verb}: {_one_line(cause)}")
    for name, cause in causes.items():
        if not _is_lost_peer(cause):
            cause.add_note(f"(raised by {name} during {method})")
            cause.__cause__ = failures[name] if failures[name] is not cause else None  # with the worker's traceback
            return cause
    if silent:
        lost = "".join(f"; {name} waited for it: {_one_line(cause)}" for name, cause in causes.items())
        return WorkerError(
            f"{', '.join(silent)} did not answer {method} within {timeout_s:g} s, it hangs or is stopped{lost}"
        )
    name, cause = next(iter(causes.items()))
    return WorkerError(f"{name} lost a peer during {method}: {_one_line(cause)}")


def _remote_cause(failure: BaseException | None) -> BaseException:
    """The exception that the worker's own code raised."""
    assert failure is not None
    while isinstance(failure, RayTaskError):
        failure = failure.cause
    return failure


def _is_lost_peer(cause: BaseException) -> bool:
    """Whether this is what a rank sees when ANOTHER one died or hangs."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out", "wait timeout")
    return isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in signs)


def _one_line(cause: BaseException) -> str:
    """The end of a message, where Ray puts what happened."""
    text = " ".join(str(cause).split())
    return text if len(text) <= MAX_CAUSE_CHARS else "... " + text[-MAX_CAUSE_CHARS:]
