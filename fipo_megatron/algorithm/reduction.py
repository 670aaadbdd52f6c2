"""How token losses become one number: the only place that knows about microbatches and ranks.

Contract with Megatron-Core (`calculate_per_token_loss`): each microbatch of each rank returns a sum and a count.
Megatron adds up the gradients of the sums over microbatches and over data- and context-parallel ranks, without scaling
any of them, adds up the counts in the same way, and divides once. So the loss of a mini-batch is

    (sum over microbatches and ranks of loss_sum) / (sum over microbatches and ranks of denominator),

which is the same number for every split of the mini-batch. With K the kept tokens, K_s those of sequence s, and S the
sequences that have any:

    token-mean               sum over K of l                                /  |K|
    seq-mean-token-mean      sum over s of (sum over K_s of l) / |K_s|      /  |S|
    seq-mean-token-sum       sum over s of (sum over K_s of l)              /  |S|
    seq-mean-token-sum-norm  sum over K of l / constant                     (no further division: denominator 0)

Megatron divides by nothing where the count is 0.
Under context parallelism each rank sums its own tokens; |K_s| is that of the whole sequence, and a sequence is counted
by rank 0 of the context group alone.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from fipo_megatron.config.schema import LossAggregation
from fipo_megatron.types import SegmentTable


def reduce_loss(
    token_losses: torch.Tensor,
    kept: torch.Tensor,
    kept_per_segment: torch.Tensor,
    segments: SegmentTable,
    aggregation: LossAggregation,
    sequence_norm: int | None = None,
    context_group: ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(loss_sum, denominator)` of this rank's tokens [N]: a scalar with graph, and a scalar int64.

    `kept` [N] bool: tokens that count; `kept_per_segment` [num_segments] int64: their number in each whole sequence,
    over all context-parallel ranks. `sequence_norm`: the constant of seq-mean-token-sum-norm, in tokens.
    """
    losses = torch.where(kept, token_losses, 0)
    if aggregation == "token-mean":
        return losses.sum(), kept.sum()
    if aggregation == "seq-mean-token-mean":
        losses = losses / expand_to_tokens(kept_per_segment.clamp(min=1), segments, len(losses))
    elif aggregation == "seq-mean-token-sum-norm":
        if sequence_norm is None or sequence_norm <= 0:
            raise ValueError(
                f"sequence_norm={sequence_norm} cannot divide a sequence's sum: loss_aggregation="
                "seq-mean-token-sum-norm needs a constant number of tokens, e.g. the response limit"
            )
        losses = losses / sequence_norm
    num_sequences = (kept_per_segment > 0).sum()
    is_final = aggregation == "seq-mean-token-sum-norm"
    counts = counts_sequences(context_group) and not is_final
    return losses.sum(), num_sequences if counts else torch.zeros_like(num_sequences)


def counts_sequences(context_group: ProcessGroup | None) -> bool:
    """Whether this rank speaks for the sequences that its context-parallel group shares."""
    return context_group is None or context_group.rank() == 0


def count_per_segment(flags: torch.Tensor, segments: SegmentTable) -> torch.Tensor:
    """Number of set `flags` [N] in each segment of this rank, int64 [num_segments]."""
    running = pad(flags.cumsum(0), (1, 0))
    return running[segments.cu_seqlens.to(flags.device)].diff()


def expand_to_tokens(per_segment: torch.Tensor, segments: SegmentTable, num_tokens: int) -> torch.Tensor:
    """`per_segment` [num_segments] repeated for every token of its segment, [N]."""
    lengths = segments.cu_seqlens.diff().to(per_segment.device)
    return per_segment.repeat_interleave(lengths, output_size=num_tokens)
