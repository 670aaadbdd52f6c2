"""Calls of one function in processes that can be killed: a call that hangs, crashes or eats memory harms itself alone.

A worker is a spawned process that knows one function. Its main thread calls; a second thread reads the pipe, so that
the worker ends when the driver is gone, even while a call runs.

The limit on a call's time is one on processor time: a right answer must not become wrong because the machine is busy.
The kernel keeps it, by a signal that ends the worker, also one without a driver in a call that holds the interpreter's
lock and so stops the second thread, too. A call that sleeps uses no processor time: the driver ends it when a multiple
of the limit has passed on the clock.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import queue
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

STARTUP_S = 60.0  # imports included, on a busy machine
CLOCK_FACTOR = 4.0  # a call has so many times its processor time on the clock
Kind = Literal["value", "error", "timeout", "crash"]


@dataclass(frozen=True)
class Outcome:
    """What became of one call."""

    kind: Kind
    value: Any = None  # the result; of an error its text


class WorkerPool:
    """Up to `num_workers` processes, started when first needed. Threads may share a pool: their calls queue up.

    `function` is `package.module:name` or `path/to/file.py:name`. A call may take `timeout_s` of processor time, and
    CLOCK_FACTOR times as long on the clock. The processes end with `close()` and with the driver.
    """

    def __init__(self, function: str, num_workers: int, timeout_s: float, memory_bytes: int) -> None:
        self._function = function
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._workers: list[_Worker] = []
        self._turn = threading.Lock()  # held by the thread whose calls run
        self._is_closed = False

    def run_many(self, calls: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        """The outcome of the function for every tuple of arguments, in order.

        Raises:
            RuntimeError: a worker cannot load the function, or the pool is closed, maybe by another thread.
        """
        with self._turn:
            try:
                return self._run_many(calls)
            except BaseException:
                self._end_workers()  # answers to these calls must not be taken for those to later ones
                raise

    def close(self) -> None:
        """Ends all workers, for good: calls under way and later ones fail."""
        self._is_closed = True
        for worker in tuple(self._workers):
            worker.process.kill()  # wakes the thread that waits for it
        with self._turn:
            self._end_workers()

    def _run_many(self, calls: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        while waiting or any(worker.call is not None for worker in self._workers):
            if self._is_closed:
                raise RuntimeError(f"closed while {self._function} had {len(waiting)} calls to come")
            self._start_workers(len(waiting))
            self._hand_out(calls, waiting, outcomes)
            for index, outcome in self._collect():
                outcomes[index] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _start_workers(self, num_waiting: int) -> None:
        num_free = sum(worker.call is None for worker in self._workers)
        for _ in range(min(self._num_workers - len(self._workers), num_waiting - num_free)):
            self._workers.append(_Worker(self._function, self._timeout_s, self._memory_bytes))

    def _hand_out(self, calls: Sequence[tuple[Any, ...]], waiting: deque[int], outcomes: list[Outcome | None]) -> None:
        for worker in [worker for worker in self._workers if worker.is_ready and worker.call is None]:
            if not waiting:
                return
            index = waiting.popleft()
            try:
                worker.start_call(index, calls[index], self._timeout_s)
            except OSError:  # it died since its last call
                outcomes[index] = Outcome("crash")
                self._remove(worker)

    def _collect(self) -> list[tuple[int, Outcome]]:
        """Outcomes of the calls that ended, after waiting for the next event."""
        awaited = [worker for worker in self._workers if not worker.is_ready or worker.call is not None]
        nearest = min((worker.deadline for worker in awaited), default=time.monotonic())
        answering = wait([worker.connection for worker in awaited], max(nearest - time.monotonic(), 0.0))
        ended = []
        for worker in awaited:
            if worker.connection in answering:
                outcome = worker.receive()
            elif time.monotonic() > worker.deadline:
                outcome = Outcome("timeout")
            else:
                continue
            if not worker.is_ready:
                self._check_start(outcome)
                worker.is_ready = True
                continue
            if outcome.kind in ("timeout", "crash"):
                self._remove(worker)
            assert worker.call is not None
            ended.append((worker.call, outcome))
            worker.call = None
        return ended

    def _check_start(self, outcome: Outcome) -> None:
        if outcome.kind != "value":
            cause = {
                "error": outcome.value,
                "timeout": f"not loaded within {STARTUP_S:g} s",
                "crash": "the process ended while it was loaded",
            }[outcome.kind]
            raise RuntimeError(f"cannot load {self._function} in a worker process: {cause}")

    def _remove(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)


class _Worker:
    """The driver's end of one process."""

    def __init__(self, function: str, timeout_s: float, memory_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, worker_end = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(worker_end, function, timeout_s, memory_bytes), daemon=True, name="reward-worker"
        )
        self.process.start()
        worker_end.close()  # else its pipe would not break when it ends
        self.is_ready = False
        self.call: int | None = None  # index of the running call
        self.deadline = time.monotonic() + STARTUP_S

    def start_call(self, index: int, arguments: tuple[Any, ...], timeout_s: float) -> None:
        self.connection.send(arguments)
        self.call, self.deadline = index, time.monotonic() + CLOCK_FACTOR * timeout_s

    def receive(self) -> Outcome:
        try:
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            self.process.kill()  # if it closed its end otherwise than by dying; if not, what it dies of is settled
            self.process.join()
            return Outcome("timeout" if self.process.exitcode == -signal.SIGPROF else "crash")
        try:
            return Outcome(*pickle.loads(message))
        except Exception as error:  # e.g. of a class that only the worker can import
            return Outcome("error", f"its result cannot be sent: {type(error).__name__}: {error}")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def load_function(function: str) -> Callable[..., Any]:
    """The module-level function that `package.module:name` or `path/to/file.py:name` names."""
    location, _, name = function.rpartition(":")
    if not location.endswith(".py"):
        loaded: Callable[..., Any] = getattr(importlib.import_module(location), name)
        return loaded
    spec = importlib.util.spec_from_file_location("reward_function", location)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    loaded = getattr(module, name)
    return loaded


def _serve(connection: Connection, function: str, timeout_s: float, memory_bytes: int) -> None:
    """The life of a worker: load the function, say so, then answer calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the driver, which then closes the pipe
    os.dup2(sys.stderr.fileno(), 1)  # what the function prints must not mix with the driver's output
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    calls: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    threading.Thread(target=_read_calls, args=(connection, calls), daemon=True).start()
    try:
        call = load_function(function)
    except BaseException as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))
        return
    connection.send(("value",))
    while True:
        arguments = calls.get()
        _limit_memory(memory_bytes)
        signal.setitimer(signal.ITIMER_PROF, timeout_s)  # counts the processor time of all threads
        answer = _answer(call, arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(answer)


def _read_calls(connection: Connection, calls: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    while True:
        try:
            calls.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the driver closed the pipe or is gone: nobody waits for a running call


def _answer(call: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(("value", call(*arguments)))
    except (MemoryError, RecursionError):
        os._exit(1)  # what the response brought about, not the rule's own fault: a crash
    except Exception as error:
        return pickle.dumps(("error", f"{type(error).__name__}: {error}"))


def _limit_memory(memory_bytes: int) -> None:
    """Limits the address space to so much beyond what the process holds so far."""
    held_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = held_bytes + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
