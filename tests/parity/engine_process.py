"""An engine in a process of its own, called over a pipe: what its Ray actor does in a run, without Ray."""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from fipo_megatron.config.schema import Config
from fipo_megatron.rollout.stream import in_request_order
from fipo_megatron.rollout.vllm import vllm_environment
from fipo_megatron.trainer.policy_processes import CONTEXT
from fipo_megatron.types import Generation, GenerationRequest, SamplingSettings

START_S, CALL_S = 180, 120


class EngineProcess:
    """`with EngineProcess("vllm", folder, config) as engine: engine.generate(requests, sampling)`.

    `engine` is "vllm", "hf", or a class as "module:name".
    """

    def __init__(self, engine: str, folder: Path, config: Config, load_weights: bool = False) -> None:
        self._pipe, child = CONTEXT.Pipe()
        # No daemon: an engine of several workers has processes of its own.
        self._process = CONTEXT.Process(target=_serve, args=(child, engine, folder, config, load_weights))

    def start(self, method: str, *arguments: Any) -> None:
        """Send a call; `result` fetches what it returns."""
        self._pipe.send((method, arguments))

    def result(self, timeout_s: float = CALL_S) -> Any:
        """What the started call returned; a RuntimeError with its traceback if it raised."""
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"the engine's process did not answer within {timeout_s} s")
        value, error = self._pipe.recv()
        if error:
            raise RuntimeError(error)
        return value

    def call(self, method: str, *arguments: Any) -> Any:
        """Start a call and wait for it."""
        self.start(method, *arguments)
        return self.result()

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingSettings) -> list[Generation]:
        """All generations of the engine's stream, in order."""
        return in_request_order(self.call("generate", requests, sampling), len(requests))

    def __enter__(self) -> Self:
        self._process.start()
        self.result(START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        with contextlib.suppress(psutil.NoSuchProcess):  # a test has ended it
            for process in reversed(self.processes):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.join()

    @property
    def processes(self) -> list[psutil.Process]:
        """The engine's process and those that it has started."""
        own = psutil.Process(self._process.pid)
        return [own, *own.children(recursive=True)]


def _serve(pipe: Any, engine: str, folder: Path, config: Config, load_weights: bool) -> None:
    os.environ.update(vllm_environment(config, on_cpu=True) | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    try:
        if engine == "vllm" and config.rollout.mode == "server":
            engine = "fipo_megatron.rollout.vllm_server:VllmServerEngine"
        module, _, name = {
            "vllm": "fipo_megatron.rollout.vllm:VllmEngine",
            "hf": "fipo_megatron.rollout.hf:HfEngine",
        }.get(engine, engine).partition(":")
        Engine = getattr(importlib.import_module(module), name)
        served = Engine(folder, config, load_weights)
        pipe.send((None, None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            value = getattr(served, method)(*arguments)
            if method == "generate":
                value = list(chain.from_iterable(value))
            pipe.send((value, None))
        except Exception as error:
            pipe.send((None, f"{traceback.format_exc()}{type(error).__name__}"))
