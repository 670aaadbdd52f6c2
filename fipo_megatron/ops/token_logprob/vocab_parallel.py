"""Log-probs and entropy from vocabulary shards: no row of logits is ever gathered, and none is changed in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.functional import pad


class VocabParallelLogprob(torch.autograd.Function):
    """d log p(y) / d logit_j = ((j == y) - p_j) / temperature, with p computed again in the backward pass.

    Only the logits, which the model's output keeps alive anyway, and one number a token wait for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target_ids: torch.Tensor,
        temperature: float,
        vocab_start: int,
        num_columns: int,
        tp_group: ProcessGroup | None,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """log p(target) [N] and entropy [N] or None; `num_columns` of this shard's columns belong to the vocabulary."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        shifted = logits[:, :num_columns].to(dtype, copy=True).div_(temperature)
        peak = shifted.amax(1) if num_columns else shifted.new_full(logits.shape[:1], -torch.inf)
        if tp_group is not None:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=tp_group)
        shifted.sub_(peak[:, None])

        local_ids = target_ids - vocab_start
        is_local = (local_ids >= 0) & (local_ids < num_columns)
        rows = is_local.nonzero().squeeze(1)
        columns = local_ids[rows]
        sums = shifted.new_zeros(3 if with_entropy else 2, len(logits))  # this shard's part of three sums over the row
        sums[0, rows] = shifted[rows, columns]
        if with_entropy:
            exponentials = shifted.exp()
            sums[1] = exponentials.sum(1)
            sums[2] = exponentials.mul_(shifted).sum(1)
        else:
            sums[1] = shifted.exp_().sum(1)
        if tp_group is not None:
            dist.all_reduce(sums, group=tp_group)

        log_sum = sums[1].log()
        ctx.save_for_backward(logits, peak + log_sum, rows, columns)
        ctx.temperature, ctx.num_columns = temperature, num_columns
        if not with_entropy:
            return sums[0] - log_sum, None
        entropy = log_sum - sums[2] / sums[1]
        ctx.mark_non_differentiable(entropy)
        return sums[0] - log_sum, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """The gradient of this shard's logits, in their dtype; zero in padded columns."""
        logits, log_normalizer, rows, columns = ctx.saved_tensors
        scale = grad_logprobs / ctx.temperature
        grad = logits[:, : ctx.num_columns].to(log_normalizer.dtype, copy=True).div_(ctx.temperature)
        grad.sub_(log_normalizer[:, None]).exp_().mul_(-scale[:, None])
        grad[rows, columns] += scale[rows]
        padding = logits.size(1) - ctx.num_columns
        return pad(grad.to(logits.dtype), (0, padding)), None, None, None, None, None, None
