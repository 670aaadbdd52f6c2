"""The discounted sum of future values, F_t = x_t + gamma * F_{t+1}, inside each segment of a flat token tensor."""

from __future__ import annotations

import importlib
import logging
from functools import cache

import torch
from torch.distributed import ProcessGroup

from fipo_megatron.ops.future_kl_scan.reference import scan_reference
from fipo_megatron.ops.future_kl_scan.sequence_parallel import ScanFunction, scan_over_context
from fipo_megatron.ops.future_kl_scan.torch_impl import scan_chunked
from fipo_megatron.types import SegmentTable

__all__ = ["choose_scan", "future_kl_scan"]

IMPLEMENTATIONS = ("auto", "torch", "numba", "triton", "reference")

logger = logging.getLogger(__name__)


@torch.no_grad()
def future_kl_scan(
    values: torch.Tensor,
    gamma: float,
    segments: SegmentTable,
    *,
    impl: str = "auto",
    context_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """F with F_t = x_t + gamma * F_{t+1}, F = 0 behind the end of a segment; shape and dtype of `values`, no gradient.

    `values` is [N], float32 or float64, finite. With `context_group` the segments are the zig-zag chunks of one rank
    (see SegmentTable) and every rank of the group must call, also one without tokens: one all-gather of
    [num_segments, 2, 2]. Source: equation 3 of the paper, as the linear recurrence it is. The decay is only ever
    multiplied, never divided by: gamma**10000 underflows to 0 without harm.

    `impl` is `auto`, which takes `numba` on the CPU, where it is installed, and `triton` on a GPU; `torch` (matrix
    products, on any device), `reference` (a loop over tokens). All are O(N). Raises ValueError for what cannot be
    scanned, and for an `impl` that does not run on the device of `values`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not known: use one of {', '.join(IMPLEMENTATIONS)}")
    if values.dim() != 1 or values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"values is {values.dtype} {list(values.shape)}: pass a flat float32 or float64 tensor")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} does not decay: pass a number in [0, 1]")
    _check_table(values, segments)
    scan = _load_scan(choose_scan(values.device.type) if impl == "auto" else impl)
    if context_group is None:
        return scan(values, gamma, segments)
    return scan_over_context(values, gamma, segments, scan, context_group)


def _check_table(values: torch.Tensor, segments: SegmentTable) -> None:
    """ValueError for a table on the CPU that isn't of these values; one on a device is not waited for."""
    for name, table in (("cu_seqlens", segments.cu_seqlens), ("cu_chunks", segments.cu_chunks)):
        if table is None or table.device.type != "cpu":
            continue
        if table.dim() != 1 or not len(table) or table[0] != 0 or table[-1] != len(values) or (table.diff() < 0).any():
            raise ValueError(
                f"{name} is {table.tolist()[:8]}, of {table.numel()} numbers: pass boundaries that rise from 0 to the "
                f"{len(values)} values"
            )


@cache
def choose_scan(device_type: str) -> str:
    """The implementation that `auto` means; said once for a device."""
    if device_type == "cuda":
        impl = "triton"
    elif device_type == "cpu" and _has_numba():
        impl = "numba"
    else:
        impl = "torch"
    logger.info("future-KL scan on %s: impl=%s", device_type, impl)
    return impl


def _has_numba() -> bool:
    """Whether it can be imported: it refuses a NumPy that is newer than itself."""
    try:
        importlib.import_module("numba")
    except ImportError:
        return False
    return True


def _load_scan(impl: str) -> ScanFunction:
    if impl == "numba":
        from fipo_megatron.ops.future_kl_scan.numba_kernel import scan_numba

        return scan_numba
    if impl == "triton":
        from fipo_megatron.ops.future_kl_scan.triton_kernel import scan_triton

        return scan_triton
    return scan_reference if impl == "reference" else scan_chunked
