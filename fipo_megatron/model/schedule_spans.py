"""Spans of what Megatron's pipeline schedules do: microbatches forward and backward, and messages between stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.utils import get_model_config

from fipo_megatron.observability.timers import SpanRecorder


def recorded_schedules(
    recorder: SpanRecorder, chunks: Sequence[DistributedDataParallel]
) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Functions that record, and where they belong: owner and attribute.

    `forward` ends with the loss, `p2p` has the time that a stage waits for another's message, unless the schedule goes
    on meanwhile (interleaved with overlap), and `reduce gradients` that for the other data-parallel ranks.
    """
    configs = {id(config): config for config in map(get_model_config, chunks)}
    names = [
        (schedules, "forward_step", "forward"),
        (schedules, "backward_step", "backward"),
        (p2p_communication.P2PCommunicator, "_communicate", "p2p"),
        *((config, "finalize_model_grads_func", "reduce gradients") for config in configs.values()),
    ]
    return [(owner, name, recorder.timed(span, getattr(owner, name))) for owner, name, span in names]
