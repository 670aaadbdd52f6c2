"""The scan over segments that are spread over context-parallel ranks: local scans and one small all-gather."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from fipo_megatron.types import SegmentTable


class ScanFunction(Protocol):
    """A scan of segments that lie whole on this rank."""

    def __call__(self, values: torch.Tensor, gamma: float, segments: SegmentTable) -> torch.Tensor: ...


def scan_over_context(
    values: torch.Tensor, gamma: float, segments: SegmentTable, scan: ScanFunction, group: ProcessGroup
) -> torch.Tensor:
    """F of this rank's tokens `values` [N]: two zig-zag chunks a segment, each continued by the chunks right of it.

    A chunk of n tokens passes on to its left neighbour: its own first F + gamma**n * (what it takes over itself).
    Collectives: one all-gather of [num_segments, 2, 2] over `group`; every rank must call.
    """
    cu_chunks = _chunk_boundaries(segments)
    local = scan(values, gamma, SegmentTable(cu_chunks))

    cu_chunks = cu_chunks.to(values.device)
    starts, ends, lengths = cu_chunks[:-1], cu_chunks[1:], cu_chunks.diff()
    heads = torch.where(lengths > 0, pad(local, (0, 1))[starts], 0)  # an empty chunk may start behind the last token
    carries = _gather_carries(heads, _powers(gamma, lengths, values.dtype), group)

    distances = ends.repeat_interleave(lengths, output_size=len(values)) - torch.arange(
        len(values), device=values.device
    )
    incoming = carries.repeat_interleave(lengths, output_size=len(values))
    return local + incoming * _powers(gamma, distances, values.dtype)


def _chunk_boundaries(segments: SegmentTable) -> torch.Tensor:
    if segments.cu_chunks is not None:
        return segments.cu_chunks
    lengths = segments.cu_seqlens.diff()
    if bool((lengths % 2).any()):
        raise ValueError(
            f"segments of {lengths.tolist()} tokens cannot be two equal zig-zag halves: "
            "pad every sequence to a multiple of 2 * context-parallel size, or pass cu_chunks"
        )
    return pad((lengths // 2).repeat_interleave(2).cumsum(0), (1, 0))


def _powers(gamma: float, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gamma**exponents; in float64 first, for the rounding of gamma is multiplied by the exponent."""
    return (gamma ** exponents.double()).to(dtype)


def _gather_carries(heads: torch.Tensor, decays: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """What this rank's chunks take over from those right of them, [2 * num_segments].

    `heads` [2 * num_segments]: F at the first token of this rank's chunks, from these chunks alone; 0 where a chunk is
    empty. `decays`: gamma**(tokens of the chunk).
    """
    size, rank = group.size(), group.rank()
    local = torch.stack([heads, decays], dim=-1).view(-1, 2, 2)  # [num_segments, chunk, (head, decay)]
    gathered = local.new_empty(size * len(local), 2, 2)
    dist.all_gather_into_tensor(gathered, local, group=group)
    by_rank = gathered.view(size, len(local), 2, 2)
    in_order = torch.cat([by_rank[:, :, 0], by_rank[:, :, 1].flip(0)])  # [2 * size, num_segments, 2], by position
    heads, decays = in_order.unbind(-1)

    incoming = torch.zeros_like(heads)
    for chunk in reversed(range(2 * size - 1)):
        incoming[chunk] = heads[chunk + 1] + decays[chunk + 1] * incoming[chunk + 1]
    return torch.stack([incoming[rank], incoming[2 * size - 1 - rank]], dim=-1).flatten()
