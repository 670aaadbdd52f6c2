"""Zig-zag order of tokens under context parallelism (Transformer Engine's order).

Each sequence, padded to a multiple of 2 * cp tokens, is cut into 2 * cp equal chunks; rank r holds chunks r and
2 * cp - 1 - r. With a causal mask every rank then has the same work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
