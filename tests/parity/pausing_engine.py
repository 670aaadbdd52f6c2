"""A vLLM engine that is updated while it samples, by the thread that samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fipo_megatron.rollout.vllm import VllmEngine
from fipo_megatron.types import FinishedResponse, GenerationRequest, SamplingSettings


class PausingEngine(VllmEngine):
    """In the middle of a stream it pauses, takes an update, and goes on."""

    def generate_around_update(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings, update_info: dict[str, Any]
    ) -> list[FinishedResponse]:
        """All responses; the update comes after the first of them."""
        stream = self.generate(requests, sampling)
        responses = next(stream)
        self.pause("keep")
        self.update_weights(update_info)
        self.resume()
        for finished in stream:
            responses += finished
        return responses

    def leave_a_stream(self, requests: Sequence[GenerationRequest], sampling: SamplingSettings) -> int:
        """How many responses were read of a stream that was left after its first ones."""
        stream = self.generate(requests, sampling)
        finished = next(stream)
        stream.close()
        return len(finished)
