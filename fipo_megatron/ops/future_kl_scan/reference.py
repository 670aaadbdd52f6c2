"""The recurrence as it is written: the oracle of the fast forms."""

from __future__ import annotations

from itertools import pairwise

import torch

from fipo_megatron.types import SegmentTable


def scan_reference(values: torch.Tensor, gamma: float, segments: SegmentTable) -> torch.Tensor:
    """F of every token of `values` [N], one token after the other from the end of each segment."""
    result = torch.empty_like(values)
    for start, end in pairwise(segments.cu_seqlens.tolist()):
        future = values.new_zeros(())
        for t in reversed(range(start, end)):
            future = values[t] + gamma * future
            result[t] = future
    return result
