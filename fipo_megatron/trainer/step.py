"""One pass of a mini-batch through Megatron's pipeline schedule: log-probs, or loss and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from fipo_megatron.algorithm.fipo_loss import fipo_loss
from fipo_megatron.config.schema import AlgorithmConfig
from fipo_megatron.ops.token_logprob import token_logprob
from fipo_megatron.parallel.groups import ParallelGroups
from fipo_megatron.parallel.packing import PaddedRows
from fipo_megatron.types import LossOutput

# (rows, log-probs [B, L], entropy [B, L]) -> what the microbatch adds to the loss
RowsLoss = Callable[[PaddedRows, torch.Tensor, torch.Tensor], LossOutput]


class PipelineStep:
    """Runs microbatches of equal shape through the schedule of this rank's stage."""

    def __init__(self, model: DistributedDataParallel, groups: ParallelGroups, vocab_size: int) -> None:
        self.model = model
        self.groups = groups
        self.vocab_size = vocab_size
        self.schedule = get_forward_backward_func()

    def logprobs(self, microbatches: Sequence[PaddedRows], temperature: float) -> list[torch.Tensor]:
        """Log-probs `[B, L]` of the targets, a microbatch each; empty except on the last stage. Collective."""

        def collect(rows: PaddedRows, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logprobs, _ = self._token_logprobs(rows, logits, temperature, with_entropy=False)
            return torch.zeros(()), torch.zeros((), dtype=torch.int), logprobs

        with torch.no_grad():
            return self._run(microbatches, collect, forward_only=True)

    def gradients(self, microbatches: Sequence[PaddedRows], temperature: float, loss: RowsLoss) -> list[torch.Tensor]:
        """Statistics of the loss, a microbatch each; empty except on the last stage. Collective.

        Leaves in Megatron's gradient buffers the gradient of sum(loss_sum) / sum(denominator) over all ranks.
        """

        def microbatch_loss(rows: PaddedRows, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logprobs, entropy = self._token_logprobs(rows, logits, temperature, with_entropy=True)
            assert entropy is not None
            output = loss(rows, logprobs, entropy)
            return output.loss_sum, output.denominator.to(torch.int), output.statistics

        # Also `param.grad`: Megatron's plain optimizer leaves it an alias of its buffer, which would count twice.
        for parameter in self.model.parameters():
            parameter.grad = None
        self.model.zero_grad_buffer()
        return self._run(microbatches, microbatch_loss, forward_only=False)

    def _token_logprobs(
        self, rows: PaddedRows, logits: torch.Tensor, temperature: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logprobs, entropy = token_logprob(
            logits.flatten(0, 1),
            rows.targets.flatten(),
            temperature=temperature,
            true_vocab_size=self.vocab_size,
            vocab_start=self.groups.tensor.rank() * logits.size(-1),
            tp_group=self.groups.tensor,
            with_entropy=with_entropy,
        )
        return logprobs.view_as(rows.targets), None if entropy is None else entropy.view_as(rows.targets)

    def _run(self, microbatches: Sequence[PaddedRows], loss: Callable[..., Any], forward_only: bool) -> list[Any]:
        def forward_step(
            iterator: Iterator[PaddedRows], model: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
            rows = next(iterator)
            return model(rows.tokens, rows.position_ids, None), partial(loss, rows)

        num_rows, num_columns = microbatches[0].tokens.shape
        return self.schedule(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=num_columns * self.groups.context.size(),
            micro_batch_size=num_rows,
            forward_only=forward_only,
        )


def policy_loss(
    rows: PaddedRows,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    *,
    config: AlgorithmConfig,
    groups: ParallelGroups,
    sequence_norm: int,
) -> LossOutput:
    """FIPO's loss of one microbatch."""
    return fipo_loss(
        logprobs,
        rows.old_logprobs,
        rows.advantages,
        rows.response_mask,
        config,
        entropy=entropy,
        ref_logprobs=rows.ref_logprobs,
        context_group=groups.context if groups.context.size() > 1 else None,
        sequence_norm=sequence_norm,
    )


def supervised_loss(rows: PaddedRows, logprobs: torch.Tensor, entropy: torch.Tensor) -> LossOutput:
    """Negative log-likelihood of the response tokens; its statistics are (sum of losses, tokens, sum of entropies)."""
    loss_sum = -(logprobs * rows.response_mask).sum()
    num_tokens = rows.response_mask.sum()
    entropy_sum = (entropy * rows.response_mask).sum()
    statistics = torch.stack([loss_sum.detach(), num_tokens.to(loss_sum), entropy_sum]).double()
    return LossOutput(loss_sum, num_tokens, statistics)
