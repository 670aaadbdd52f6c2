"""The rollout interface: what the loop asks of an engine, all of it awaitable."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from fipo_megatron.types import FinishedResponse, GenerationRequest, SamplingSettings


class EngineUpdateError(RuntimeError):
    """A weight update failed: the engine may be half-updated and must be rebuilt."""


class RolloutClient(Protocol):
    """An engine, wherever it runs."""

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> AsyncIterator[FinishedResponse]:
        """One response a request, in the order in which they are finished, by the weights of the last update."""
        ...

    async def connect_weights(self, address: str, port: int) -> None:
        """Join the weight group whose rank 0 is the trainer's."""
        ...

    async def update_weights(self, tensors: Sequence[tuple[str, tuple[int, ...], str]], version: int) -> None:
        """Receive the tensors `(name, shape, dtype)` that the trainer sends, in order; cached prefixes are reset."""
        ...
