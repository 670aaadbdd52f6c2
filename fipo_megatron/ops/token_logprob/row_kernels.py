"""What an implementation of the log-prob kernels provides: two functions over one block of logits, and nothing else.

A block is [N, C]: a vocabulary shard, or one chunk of it in a workspace. Collectives, chunks, autograd and checks are
written once over these two functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class RowStatistics:
    """Sums over the counted columns of one block of z = logits / temperature; [N], float32 (float64 for float64)."""

    peak: torch.Tensor  # max_j z_j; -inf where no column counts
    sum_exp: torch.Tensor  # sum_j exp(z_j - peak); 0 where no column counts
    sum_shifted: torch.Tensor | None  # sum_j exp(z_j - peak) * (z_j - peak); None unless with_entropy
    target: torch.Tensor  # z_y - peak where the target y is a counted column of this block, else 0


class RowKernels(Protocol):
    """An implementation. Only the first `num_columns` columns of a block count; column j is `first_column + j`.

    `logits` [N, C] is float16, bfloat16, float32 or float64, contiguous along C, with any stride between rows;
    `target_ids` int64 [N] are global. Arithmetic is float32, or float64 for float64 logits.
    """

    def row_statistics(
        self,
        logits: torch.Tensor,
        target_ids: torch.Tensor,
        *,
        temperature: float,
        first_column: int,
        num_columns: int,
        with_entropy: bool,
    ) -> RowStatistics:
        """Statistics of this block's rows; reads the logits once."""
        ...

    def write_logit_gradient(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        target_ids: torch.Tensor,
        log_normalizer: torch.Tensor,
        grad_logprobs: torch.Tensor,
        *,
        entropy: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
        temperature: float,
        first_column: int,
        num_columns: int,
    ) -> None:
        """Writes the gradient of the block's logits to `out` [N, C], of any of the dtypes; it may be `logits` itself.

        With p_j = exp(z_j - log_normalizer), where `log_normalizer` [N] and `entropy` [N] are those of the whole
        vocabulary: ((j == y) - p_j) * grad_logprobs / temperature
        - p_j * (z_j - log_normalizer + entropy) * grad_entropy / temperature, and exactly 0 in columns that don't
        count. Both entropy arguments are None where the entropy has no gradient.
        """
        ...


def find_local(target_ids: torch.Tensor, first_column: int, num_columns: int) -> torch.Tensor:
    """Which targets [N] are among a block's counted columns."""
    return (target_ids >= first_column) & (target_ids < first_column + num_columns)


def rescale(statistics: RowStatistics, is_local: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """(sum_exp, target, sum_shifted if there is one) of blocks relative to another `peak`, stacked first.

    What blocks say about the same rows can then be added. `is_local`: the block has the row's target.
    """
    # A block without a counted column has peak -inf, and -inf * 0 is no 0.
    offset = torch.where(statistics.sum_exp > 0, statistics.peak - peak, 0)
    scale = offset.exp()
    sums = [statistics.sum_exp * scale, torch.where(is_local, statistics.target + offset, 0)]
    if statistics.sum_shifted is not None:
        sums.append((statistics.sum_shifted + offset * statistics.sum_exp) * scale)
    return torch.stack(sums)


def merge_blocks(
    blocks: Sequence[RowStatistics], first_columns: Sequence[int], num_columns: Sequence[int], target_ids: torch.Tensor
) -> RowStatistics:
    """Statistics of the same rows over blocks side by side, of which there is at least one."""
    if len(blocks) == 1:
        return blocks[0]
    shifted = [block.sum_shifted for block in blocks if block.sum_shifted is not None]
    stacked = RowStatistics(
        torch.stack([block.peak for block in blocks]),
        torch.stack([block.sum_exp for block in blocks]),
        torch.stack(shifted) if shifted else None,
        torch.stack([block.target for block in blocks]),
    )
    pairs = zip(first_columns, num_columns, strict=True)
    is_local = torch.stack([find_local(target_ids, first, columns) for first, columns in pairs])
    peak = stacked.peak.amax(0)
    sums = rescale(stacked, is_local, peak).sum(1)
    return RowStatistics(peak, sums[0], sums[2] if shifted else None, sums[1])
