"""The rollout interface: what the loop asks of an engine, all of it awaitable."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

from fipo_megatron.types import FinishedResponse, GenerationRequest, SamplingSettings

EngineMemory = Literal["weights", "kv_cache"]  # what an engine takes of a device, part by part
ENGINE_MEMORY: tuple[EngineMemory, ...] = ("weights", "kv_cache")


class EngineUpdateError(RuntimeError):
    """A weight update failed: the engines of `replicas` may be half-updated and must be rebuilt."""

    def __init__(self, message: str, replicas: list[int]) -> None:
        super().__init__(message)
        self.replicas = replicas


class RolloutClient(Protocol):
    """An engine, wherever it runs."""

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> AsyncIterator[FinishedResponse]:
        """One response a request, in the order in which they are finished, by the weights of the last update."""
        ...
