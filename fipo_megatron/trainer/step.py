"""One pass of a mini-batch through Megatron's pipeline schedule: log-probs, or loss and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from fipo_megatron.algorithm.fipo_loss import fipo_loss
from fipo_megatron.config.schema import AlgorithmConfig, KernelsConfig
from fipo_megatron.model.local_layers import pack_sequences
from fipo_megatron.ops.linear_logprob import linear_logprob
from fipo_megatron.ops.token_logprob import token_logprob
from fipo_megatron.parallel.groups import ParallelGroups
from fipo_megatron.parallel.packed import PackedTokens
from fipo_megatron.types import LossOutput

# (microbatch, log-probs [R], entropy [R] where it is computed) -> what the microbatch adds to the loss
MicrobatchLoss = Callable[[PackedTokens, torch.Tensor, torch.Tensor | None], LossOutput]


class PipelineStep:
    """Runs packed microbatches through the schedule of this rank's model chunks."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        groups: ParallelGroups,
        vocab_size: int,
        kernels: KernelsConfig,
    ) -> None:
        self.chunks = list(chunks)
        self.groups = groups
        self.vocab_size = vocab_size
        self.kernels = kernels
        self.schedule = get_forward_backward_func()

    def logprobs(self, microbatches: Sequence[PackedTokens], temperature: float) -> list[torch.Tensor]:
        """Log-probs `[R]` of this rank's response tokens, a microbatch each; empty except on the last stage.
        Collective."""

        def collect(
            packed: PackedTokens, model: torch.nn.Module, output: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logprobs, _ = self._logprobs(packed, model, output, temperature, entropy="none")
            no_loss = logprobs.new_zeros(())  # on its device, where Megatron scales the loss of experts
            return no_loss, no_loss.int(), logprobs

        with torch.no_grad():
            return self._run(microbatches, collect, forward_only=True)

    def gradients(
        self, microbatches: Sequence[PackedTokens], temperature: float, loss: MicrobatchLoss, entropy: str = "none"
    ) -> list[torch.Tensor]:
        """Statistics of the loss, a microbatch each; empty except on the last stage. Collective.

        `entropy`: what the loss gets of it, as in ops/linear_logprob. Leaves in Megatron's gradient buffers the
        gradient of sum(loss_sum) / sum(denominator) over all ranks.
        """

        def microbatch_loss(
            packed: PackedTokens, model: torch.nn.Module, output: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            terms = loss(packed, *self._logprobs(packed, model, output, temperature, entropy))
            return terms.loss_sum, terms.denominator.to(torch.int), terms.statistics

        for chunk in self.chunks:
            # Also `param.grad`: Megatron's plain optimizer leaves it an alias of its buffer, which would count twice.
            for parameter in chunk.parameters():
                parameter.grad = None
            chunk.zero_grad_buffer()
        return self._run(microbatches, microbatch_loss, forward_only=False)

    def _logprobs(
        self, packed: PackedTokens, model: torch.nn.Module, output: torch.Tensor, temperature: float, entropy: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs and entropy [R] from what the last stage returned, hidden states or logits."""
        gpt: Any = model.module
        kernels = self.kernels
        settings: dict[str, Any] = {
            "temperature": temperature,
            "true_vocab_size": self.vocab_size,
            "vocab_start": self.groups.tensor.rank() * len(gpt.head_weight),
            "tp_group": self.groups.tensor,
            "entropy": entropy,
            "impl": kernels.logprob,
        }
        if gpt.returns_hidden_states:
            workspace_bytes = kernels.workspace_mib << 20
            return linear_logprob(
                output[0], gpt.head_weight, packed.targets, workspace_bytes=workspace_bytes, **settings
            )
        return token_logprob(output[0], packed.targets, **settings)

    def _run(self, microbatches: Sequence[PackedTokens], loss: Callable[..., Any], forward_only: bool) -> list[Any]:
        def forward_step(
            iterator: Iterator[PackedTokens], model: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
            packed = next(iterator)
            output = model(
                packed.tokens[None],
                packed.position_ids[None],
                None,
                packed_seq_params=pack_sequences(packed.cu_seqlens, self.groups.context),
                rows=packed.response_index,
            )
            return output, partial(loss, packed, model)

        iterators = [iter(microbatches) for _ in self.chunks]
        is_virtual = len(self.chunks) > 1
        results = self.schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if is_virtual else iterators[0],
            model=self.chunks if is_virtual else self.chunks[0],
            num_microbatches=len(microbatches),
            seq_length=max(len(packed.tokens) for packed in microbatches) * self.groups.context.size(),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        for chunk in self.chunks:  # which keep the last microbatch's input
            chunk.module.set_input_tensor(None)
        return results


def policy_loss(
    packed: PackedTokens,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    *,
    config: AlgorithmConfig,
    groups: ParallelGroups,
    sequence_norm: int,
    scan_impl: str,
) -> LossOutput:
    """FIPO's loss of one microbatch."""
    return fipo_loss(
        logprobs,
        packed.old_logprobs,
        packed.advantages,
        packed.loss_mask,
        config,
        segments=packed.segments,
        entropy=entropy,
        ref_logprobs=packed.ref_logprobs,
        context_group=groups.context if groups.context.size() > 1 else None,
        sequence_norm=sequence_norm,
        scan_impl=scan_impl,
    )


def supervised_loss(packed: PackedTokens, logprobs: torch.Tensor, _: torch.Tensor | None) -> LossOutput:
    """Negative log-likelihood of the response tokens; its statistics are (sum of losses, tokens)."""
    loss_sum = -(logprobs * packed.loss_mask).sum()
    num_tokens = packed.loss_mask.sum()
    return LossOutput(loss_sum, num_tokens, torch.stack([loss_sum.detach(), num_tokens.to(loss_sum)]).double())
