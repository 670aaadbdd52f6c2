"""The rollout interface: what the loop asks of an engine, all of it awaitable."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

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

    async def connect_weights(self, init_info: dict[str, Any]) -> None:
        """Meet the trainer's ranks, as a `WeightSession` and the number of the replica say (reshard/connect.py)."""
        ...

    async def update_weights(self, update_info: dict[str, Any]) -> dict[str, float]:
        """Receive the weights of `update_info["version"]`, verify them, and forget cached prefixes; what it took.

        Raises:
            WeightMismatchError: (reshard/execute.py) the engine does not hold what the trainer has sent.
        """
        ...
