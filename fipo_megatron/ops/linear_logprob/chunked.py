"""Log-probs and entropy from hidden states, a chunk of the vocabulary at a time: [N, V] never exists.

The chunks are the outer loop, so that the gradient of a weight row is finished before the next one's begins. The
backward pass computes the logits again: four products of the size of one head, where eager code has three and the
logits in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fipo_megatron.ops.linear_logprob.workspace import Blocking, Workspace
from fipo_megatron.ops.token_logprob.row_kernels import RowStatistics, merge_blocks
from fipo_megatron.ops.token_logprob.vocab_parallel import VocabShard, merge_shards, save_results


@dataclass(frozen=True)
class Head:
    """A rank's part of the output layer, and how its logits are cut."""

    shard: VocabShard
    blocking: Blocking

    def chunks(self) -> Iterator[slice]:
        """The weight rows that belong to the vocabulary, cut."""
        return _cut(self.shard.num_columns, self.blocking.columns)

    def first_column(self, chunk: slice) -> int:
        """Global number of a chunk's first column."""
        return self.shard.first_column + int(chunk.start)


class ChunkedLinearLogprob(torch.autograd.Function):
    """Hidden states, weights and a few numbers a token wait for the backward pass.

    The gradient of weights that have a `main_grad` (Megatron's buffer) is added to it, and None is returned: what other
    users of the same weights send through autograd is then added by Megatron's hook.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, head: Head
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """log p(target) [N] and entropy [N] or None."""
        results = merge_shards(compute_statistics(hidden, weight, target_ids, head), target_ids, head.shard)
        ctx.head = head
        ctx.main_grad = getattr(weight, "main_grad", None)
        save_results(ctx, (hidden, weight, target_ids), results, head.shard.entropy)
        return results.logprobs, results.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden states (summed over the group: collective) and weights."""
        hidden, weight, target_ids, log_normalizer, entropy = ctx.saved_tensors
        head: Head = ctx.head
        rows = _RowGradients(
            target_ids,
            log_normalizer,
            torch.zeros_like(log_normalizer) if grad_logprobs is None else grad_logprobs,
            None if grad_entropy is None else entropy,
            grad_entropy,
        )
        grad_hidden, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros(hidden.shape, dtype=log_normalizer.dtype, device=hidden.device)
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.main_grad
            if grad_weight is None:
                grad_weight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        if len(hidden):
            _add_gradients(hidden, weight, rows, head, grad_hidden, grad_weight)
        if grad_hidden is not None:
            group = head.shard.tp_group
            if group is not None and group.size() > 1:
                dist.all_reduce(grad_hidden, group=group)
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, None if ctx.main_grad is not None else grad_weight, None, None


@dataclass(frozen=True)
class _RowGradients:
    """What the gradient of logits takes from their rows; [N] each."""

    target_ids: torch.Tensor
    log_normalizer: torch.Tensor
    grad_logprobs: torch.Tensor
    entropy: torch.Tensor | None
    grad_entropy: torch.Tensor | None

    def __getitem__(self, rows: slice) -> _RowGradients:
        return _RowGradients(
            self.target_ids[rows],
            self.log_normalizer[rows],
            self.grad_logprobs[rows],
            None if self.entropy is None else self.entropy[rows],
            None if self.grad_entropy is None else self.grad_entropy[rows],
        )


def compute_statistics(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, head: Head
) -> RowStatistics:
    """Statistics [N] of this shard's logits, of which one block at a time exists. No collective."""
    workspace = Workspace(hidden, head.blocking)
    shard = head.shard
    chunks = list(head.chunks())
    blocks: list[list[RowStatistics]] = [[] for _ in _cut(len(hidden), head.blocking.rows)]
    if not chunks or not blocks:
        return _no_statistics(hidden, workspace.dtype, shard.entropy != "none")
    for chunk in chunks:
        weights = workspace.load("weight", weight[chunk])
        for rows, found in zip(_cut(len(hidden), head.blocking.rows), blocks, strict=True):
            logits = workspace.make_logits(workspace.load("hidden", hidden[rows]), weights)
            statistics = shard.kernels.row_statistics(
                logits,
                target_ids[rows],
                temperature=shard.temperature,
                first_column=head.first_column(chunk),
                num_columns=logits.size(1),
                with_entropy=shard.entropy != "none",
            )
            found.append(statistics)
    first_columns = [head.first_column(chunk) for chunk in chunks]
    widths = [chunk.stop - chunk.start for chunk in chunks]
    merged = [
        merge_blocks(found, first_columns, widths, target_ids[rows])
        for rows, found in zip(_cut(len(hidden), head.blocking.rows), blocks, strict=True)
    ]
    shifted = [part.sum_shifted for part in merged if part.sum_shifted is not None]
    return RowStatistics(
        torch.cat([part.peak for part in merged]),
        torch.cat([part.sum_exp for part in merged]),
        torch.cat(shifted) if shifted else None,
        torch.cat([part.target for part in merged]),
    )


def _add_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows_gradients: _RowGradients,
    head: Head,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """Adds to `grad_hidden` [N, H] of the workspace's dtype and to `grad_weight` [C, H] of any dtype."""
    workspace = Workspace(hidden, head.blocking)
    shard = head.shard
    for chunk in head.chunks():
        weights = workspace.load("weight", weight[chunk])
        grad_weights = None if grad_weight is None else grad_weight[chunk]
        total = grad_weights
        is_one_product = workspace.is_mixed and head.blocking.rows >= len(hidden)
        if grad_weights is not None and grad_weights.dtype != workspace.dtype and not is_one_product:
            # The sum over the rows is rounded once, at its end; one product does that by itself.
            total = workspace.get_buffer("total", *grad_weights.shape).zero_()
        for rows in _cut(len(hidden), head.blocking.rows):
            states, row = workspace.load("hidden", hidden[rows]), rows_gradients[rows]
            logits = workspace.make_logits(states, weights)
            gradient = workspace.get_gradient(logits)
            shard.kernels.write_logit_gradient(
                logits,
                gradient,
                row.target_ids,
                row.log_normalizer,
                row.grad_logprobs,
                entropy=row.entropy,
                grad_entropy=row.grad_entropy,
                temperature=shard.temperature,
                first_column=head.first_column(chunk),
                num_columns=logits.size(1),
            )
            if grad_hidden is not None:
                workspace.add_product(grad_hidden[rows], gradient, weights)
            if total is not None:
                workspace.add_product(total, gradient.t(), states)
        if grad_weights is not None and total is not None and total is not grad_weights:
            grad_weights.add_(total)


def _no_statistics(hidden: torch.Tensor, dtype: torch.dtype, with_entropy: bool) -> RowStatistics:
    """Those of a shard without a column of the vocabulary, or of no rows."""
    zeros = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    return RowStatistics(torch.full_like(zeros, -torch.inf), zeros, zeros if with_entropy else None, zeros)


def _cut(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
