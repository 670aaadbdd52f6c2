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
    Collectives: one all-gather of [num_segments, 2] over `group`; every rank must call.
    """
    cu_seqlens = segments.cu_seqlens.to(values.device)
    lengths = cu_seqlens.diff()
    if bool((lengths % 2).any()):
        raise ValueError(
            f"segments of {lengths.tolist()} tokens cannot be two zig-zag halves: "
            "pad every sequence to a multiple of 2 * context-parallel size"
        )
    chunk_lengths = (lengths // 2).repeat_interleave(2)  # [2 * num_segments]
    boundaries = pad(chunk_lengths.cumsum(0), (1, 0))
    local = scan(values, gamma, SegmentTable(boundaries))

    starts, ends = boundaries[:-1], boundaries[1:]
    heads = values.new_zeros(len(starts))
    filled = ends > starts
    heads[filled] = local[starts[filled]]
    carries = _gather_carries(heads.view(-1, 2), gamma ** (lengths // 2).to(values.dtype), group)

    distances = ends.repeat_interleave(chunk_lengths, output_size=len(values)) - torch.arange(
        len(values), device=values.device
    )
    incoming = carries.view(-1).repeat_interleave(chunk_lengths, output_size=len(values))
    return local + incoming * gamma ** distances.to(values.dtype)


def _gather_carries(heads: torch.Tensor, chunk_decay: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """What this rank's chunks take over from those right of them, [num_segments, 2].

    `heads` [num_segments, 2]: F at the first token of this rank's two chunks, from these chunks alone.
    `chunk_decay` [num_segments]: gamma**(tokens of a chunk), the same for all chunks of a segment.
    """
    size, rank = group.size(), group.rank()
    gathered = heads.new_empty(size * len(heads), 2)
    dist.all_gather_into_tensor(gathered, heads.contiguous(), group=group)
    by_rank = gathered.view(size, len(heads), 2)
    in_order = torch.cat([by_rank[:, :, 0], by_rank[:, :, 1].flip(0)])  # [2 * size, num_segments], by position

    incoming = torch.zeros_like(in_order)
    for chunk in reversed(range(2 * size - 1)):
        incoming[chunk] = in_order[chunk + 1] + chunk_decay * incoming[chunk + 1]
    return torch.stack([incoming[rank], incoming[2 * size - 1 - rank]], dim=-1)
