"""Whole tokens cut for context-parallel ranks and joined again; tokens are the last dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fipo_megatron.parallel.context import zigzag_positions


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
