"""Which implementation computes the rows of a block, by name or by device."""

from __future__ import annotations

import functools
import importlib
import logging

import torch
from torch.distributed import ProcessGroup

from fipo_megatron.ops.token_logprob.row_kernels import RowKernels
from fipo_megatron.ops.token_logprob.torch_impl import TorchRowKernels

logger = logging.getLogger(__name__)

TRITON_MODULE = "fipo_megatron.ops.token_logprob.triton_kernel"


def pick_implementation(operation: str, impl: str, values: torch.Tensor) -> str:
    """`impl`, or where it is "auto" that of the device of `values`; each pick is logged once a process."""
    if impl != "auto":
        return impl
    # The Triton kernels compute in float32.
    picked = "triton" if values.is_cuda and values.dtype != torch.float64 else "torch"
    _log_pick(operation, picked, values.device.type, str(values.dtype))
    return picked


def make_row_kernels(impl: str) -> RowKernels:
    """The kernels named "torch" or "triton"; those of Triton are imported here."""
    if impl == "torch":
        return TorchRowKernels()
    try:
        kernels: RowKernels = importlib.import_module(TRITON_MODULE).TritonRowKernels()
    except ImportError as error:
        raise ValueError(f"impl='triton' can't be imported ({error}): install triton, or use impl='torch'") from error
    return kernels


def check_whole_rows(impl: str, tp_group: ProcessGroup | None) -> None:
    """ValueError where the reference would have to read rows that are cut over ranks."""
    if impl == "reference" and tp_group is not None and tp_group.size() > 1:
        raise ValueError(f"impl='reference' reads whole rows, not {tp_group.size()} shards: use impl='torch'")


@functools.cache
def _log_pick(operation: str, picked: str, device: str, dtype: str) -> None:
    logger.info("%s: impl='auto' is '%s' for %s on %s", operation, picked, dtype, device)
