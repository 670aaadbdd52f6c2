"""Zig-zag order of tokens under context parallelism (Transformer Engine's order).

Each sequence, padded to a multiple of 2 * cp tokens, is cut into 2 * cp equal chunks; rank r holds chunks r and
2 * cp - 1 - r. With a causal mask every rank then has the same work. Tokens are the last dimension everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def zigzag_positions(padded_lens: Sequence[int], context_rank: int, context_size: int) -> torch.Tensor:
    """Where the tokens of one rank stand in the full flat tokens, int64 [sum(padded_lens) / cp], in local order."""
    if context_size == 1:
        return torch.arange(sum(padded_lens))
    positions = [torch.zeros(0, dtype=torch.int64)]
    start = 0
    for length in padded_lens:
        if length % (2 * context_size):
            raise ValueError(
                f"a sequence of {length} tokens has no {2 * context_size} equal chunks: pad it to a multiple of "
                f"2 * parallel.context = {2 * context_size}"
            )
        chunks = torch.arange(start, start + length).view(2 * context_size, -1)
        positions += [chunks[context_rank], chunks[2 * context_size - 1 - context_rank]]
        start += length
    return torch.cat(positions)


def split_zigzag(
    values: torch.Tensor, padded_lens: Sequence[int], context_rank: int, context_size: int
) -> torch.Tensor:
    """One rank's tokens [..., N / cp] of the full flat tokens [..., N]."""
    return values[..., zigzag_positions(padded_lens, context_rank, context_size).to(values.device)]


def merge_zigzag(parts: Sequence[torch.Tensor], padded_lens: Sequence[int]) -> torch.Tensor:
    """The full flat tokens [..., N] from those of every rank [..., N / cp], in rank order."""
    joined = torch.cat(list(parts), dim=-1)
    positions = torch.cat([zigzag_positions(padded_lens, rank, len(parts)) for rank in range(len(parts))])
    return torch.empty_like(joined).index_copy_(-1, positions.to(joined.device), joined)


def merge_context_chunks(rows: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Whole rows [..., L] from this rank's part [..., L / cp] of each. Collective: one all-gather."""
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, rows.contiguous(), group=group)
    return merge_zigzag(parts, [rows.size(-1) * group.size()])
