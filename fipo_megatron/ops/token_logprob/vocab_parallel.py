"""Log-probs and entropy from vocabulary shards, over any kernels: no row is gathered, no logit is changed in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from fipo_megatron.ops.token_logprob.row_kernels import RowKernels, RowStatistics, find_local, rescale


@dataclass(frozen=True)
class VocabShard:
    """What a rank computes of each row, and with what."""

    kernels: RowKernels
    temperature: float
    first_column: int  # global number of this shard's first column
    num_columns: int  # of its columns that belong to the vocabulary; the rest is padding
    tp_group: ProcessGroup | None
    entropy: str  # "none", "detached" or "differentiable"


@dataclass(frozen=True)
class RowResults:
    """Of rows of the whole vocabulary; [N] each."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    log_normalizer: torch.Tensor  # log sum_j exp(z_j)


def merge_shards(statistics: RowStatistics, target_ids: torch.Tensor, shard: VocabShard) -> RowResults:
    """The results of all shards' statistics. Collective over the group: one maximum [N], one sum [2 or 3, N]."""
    is_local = find_local(target_ids, shard.first_column, shard.num_columns)
    peak = statistics.peak
    is_shared = shard.tp_group is not None and shard.tp_group.size() > 1
    if is_shared:
        peak = peak.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=shard.tp_group)
    sums = rescale(statistics, is_local, peak)
    if is_shared:
        dist.all_reduce(sums, group=shard.tp_group)
    log_sum = sums[0].log()
    # Rounding can leave the sum below the target's own term. The gradient is not taken from here: it stays right.
    logprobs = (sums[1] - log_sum).clamp_(max=0)
    entropy = None if len(sums) == 2 else (log_sum - sums[2] / sums[0]).clamp_(min=0)
    return RowResults(logprobs, entropy, peak + log_sum)


class VocabParallelLogprob(torch.autograd.Function):
    """d log p(y) / d logit_j = ((j == y) - p_j) / temperature, with p computed again in the backward pass.

    Only the logits, which the model's output keeps alive anyway, and a few numbers a token wait for it.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target_ids: torch.Tensor, shard: VocabShard
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """log p(target) [N] and entropy [N] or None."""
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        statistics = shard.kernels.row_statistics(
            logits,
            target_ids,
            temperature=shard.temperature,
            first_column=shard.first_column,
            num_columns=shard.num_columns,
            with_entropy=shard.entropy != "none",
        )
        results = merge_shards(statistics, target_ids, shard)
        ctx.shard = shard
        save_results(ctx, (logits, target_ids), results, shard.entropy)
        return results.logprobs, results.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradient of this shard's logits, in their dtype; zero in padded columns."""
        logits, target_ids, log_normalizer, entropy = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        shard.kernels.write_logit_gradient(
            logits,
            grad_logits,
            target_ids,
            log_normalizer,
            torch.zeros_like(log_normalizer) if grad_logprobs is None else grad_logprobs,
            entropy=None if grad_entropy is None else entropy,
            grad_entropy=grad_entropy,
            temperature=shard.temperature,
            first_column=shard.first_column,
            num_columns=shard.num_columns,
        )
        return grad_logits, None, None


def save_results(ctx: Any, inputs: tuple[torch.Tensor, ...], results: RowResults, entropy: str) -> None:
    """Saves (*inputs, log_normalizer, entropy or None) for the backward pass and marks what has no gradient."""
    # A missing gradient comes as None, not as zeros that would cost a pass over the entropy's part.
    ctx.set_materialize_grads(False)
    if entropy == "differentiable":
        ctx.save_for_backward(*inputs, results.log_normalizer, results.entropy)
        return
    ctx.save_for_backward(*inputs, results.log_normalizer, None)
    if results.entropy is not None:
        ctx.mark_non_differentiable(results.entropy)
