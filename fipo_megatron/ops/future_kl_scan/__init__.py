"""The discounted sum of future values, F_t = x_t + gamma * F_{t+1}, inside each segment of a flat token tensor."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from fipo_megatron.ops.future_kl_scan.reference import scan_reference
from fipo_megatron.ops.future_kl_scan.sequence_parallel import ScanFunction, scan_over_context
from fipo_megatron.ops.future_kl_scan.torch_impl import scan_chunked
from fipo_megatron.types import SegmentTable

__all__ = ["future_kl_scan"]

SCANS: dict[str, ScanFunction] = {"auto": scan_chunked, "torch": scan_chunked, "reference": scan_reference}


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
    """
    if impl not in SCANS:
        raise ValueError(f"impl={impl!r} is not known: use one of {', '.join(SCANS)}")
    if values.dim() != 1 or values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"values is {values.dtype} {list(values.shape)}: pass a flat float32 or float64 tensor")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} does not decay: pass a number in [0, 1]")
    scan = SCANS[impl]
    if context_group is None:
        return scan(values, gamma, segments)
    return scan_over_context(values, gamma, segments, scan, context_group)
