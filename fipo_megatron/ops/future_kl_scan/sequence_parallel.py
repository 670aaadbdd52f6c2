"""The scan over segments that are spread over context-parallel ranks: local scans and one small all-gather."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fipo_megatron.types import SegmentTable


class ScanFunction(Protocol):
    """A scan of segments that lie whole on this rank."""

    def __call__(self, values: torch.Tensor, gamma: float, segments: SegmentTable) -> torch.Tensor: ...


def scan_over_context(
    values: torch.Tensor, gamma: float, segments: SegmentTable, scan: ScanFunction, group: ProcessGroup
) -> torch.Tensor:
    """F of this rank's tokens `values` [N]: two zig-zag chunks a segment, each continued by the chunks right of it.

    A chunk of n tokens passes on to its left neighbour: its own first F + gamma**n * (what it takes over itself).
    Collectives: one all-gather of [num_segments, 2, 2] over `group`, of each chunk its first F and gamma**n; every rank
    must call.
    """
    boundaries = _chunk_boundaries(segments).to(values.device)  # [2 * num_segments + 1]
    lengths = boundaries.diff()
    local = scan(values, gamma, SegmentTable(boundaries))

    starts, ends = boundaries[:-1], boundaries[1:]
    heads = values.new_zeros(len(starts))
    filled = ends > starts
    heads[filled] = local[starts[filled]]
    decays = gamma ** lengths.to(values.dtype)
    carries = _gather_carries(torch.stack([heads, decays], dim=-1).view(-1, 2, 2), group)

    distances = ends.repeat_interleave(lengths, output_size=len(values)) - torch.arange(
        len(values), device=values.device
    )
    incoming = carries.flatten().repeat_interleave(lengths, output_size=len(values))
    return local + incoming * gamma ** distances.to(values.dtype)


def _chunk_boundaries(segments: SegmentTable) -> torch.Tensor:
    """Where the two chunks of every segment begin, and the end, int64 [2 * num_segments + 1]."""
    begins, lengths = segments.cu_seqlens[:-1], segments.cu_seqlens.diff()
    second_halves = segments.second_halves
    if second_halves is None:
        if bool((lengths % 2).any()):
            raise ValueError(
                f"segments of {lengths.tolist()} tokens cannot be two zig-zag halves: "
                "pad every sequence to a multiple of 2 * context-parallel size"
            )
        second_halves = begins + lengths // 2
    return torch.cat([torch.stack([begins, second_halves], dim=-1).flatten(), segments.cu_seqlens[-1:]])


def _gather_carries(chunks: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """What this rank's chunks take over from those right of them, [num_segments, 2].

    `chunks` [num_segments, 2, 2]: of this rank's two chunks, F at their first token from the chunk alone, and
    gamma**(tokens of the chunk).
    """
    size, rank = group.size(), group.rank()
    gathered = chunks.new_empty(size * len(chunks), 2, 2)
    dist.all_gather_into_tensor(gathered, chunks.contiguous(), group=group)
    by_rank = gathered.view(size, len(chunks), 2, 2)
    heads, decays = torch.cat([by_rank[:, :, 0], by_rank[:, :, 1].flip(0)]).unbind(-1)  # [2 * size, num_segments] each

    incoming = torch.zeros_like(heads)  # by position in the sequence
    for chunk in reversed(range(2 * size - 1)):
        incoming[chunk] = heads[chunk + 1] + decays[chunk + 1] * incoming[chunk + 1]
    return torch.stack([incoming[rank], incoming[2 * size - 1 - rank]], dim=-1)
