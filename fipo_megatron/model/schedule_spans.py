"""Spans of what Megatron's pipeline schedules do: microbatches forward and backward, and messages between stages."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.utils import get_model_config

from fipo_megatron.observability.timers import SpanRecorder


def record_schedules(recorder: SpanRecorder, chunks: Sequence[DistributedDataParallel]) -> None:
    """Record every later schedule of this process; once, as the functions that are recorded stay so.

    `forward` ends with the loss, `p2p` has the time that a stage waits for another's message, unless the schedule goes
    on meanwhile (interleaved with overlap), and `reduce gradients` that for the other data-parallel ranks.
    """
    schedules.forward_step = recorder.timed("forward", schedules.forward_step)
    schedules.backward_step = recorder.timed("backward", schedules.backward_step)
    communicator = p2p_communication.P2PCommunicator
    communicator._communicate = recorder.timed("p2p", communicator._communicate)
    for config in {id(config): config for config in map(get_model_config, chunks)}.values():
        config.finalize_model_grads_func = recorder.timed("reduce gradients", config.finalize_model_grads_func)
