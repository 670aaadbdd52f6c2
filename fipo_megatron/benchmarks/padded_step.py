"""An actor step as it is commonly written with transformers: right-padded micro-batches, logits of every position."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fipo_megatron.algorithm.fipo_loss import fipo_loss
from fipo_megatron.config.schema import AlgorithmConfig, OptimizerConfig
from fipo_megatron.types import TrainingBatch

PAD_ID = 0


@dataclass(frozen=True)
class PaddedRows:
    """A micro-batch: B samples, prompt and response joined, padded at their ends to the L tokens of the longest.

    Column t of all but the first two speaks of token t + 1, its target, as the logits do.
    """

    token_ids: torch.Tensor  # int64 [B, L]
    attention_mask: torch.Tensor  # int64 [B, L], 1 for tokens, 0 for padding
    response_mask: torch.Tensor  # bool [B, L - 1]
    advantages: torch.Tensor  # float32 [B, L - 1], the sample's in every column
    old_logprobs: torch.Tensor  # float32 [B, L - 1], 0 outside the response and where the batch has none


@dataclass(frozen=True)
class PaddedSettings:
    """How the loop cuts and pads its batch, and computes attention."""

    rows: int  # samples of a micro-batch
    attention: str = "sdpa"  # transformers' attn_implementation
    sorted: bool = False  # whether like lengths are put together, the longest first; else the batch's order

    def micro_batches(self, lengths: np.ndarray) -> list[list[int]]:
        """Samples of each micro-batch, of their lengths int64 [S] in tokens."""
        order = np.argsort(-lengths, kind="stable") if self.sorted else np.arange(len(lengths))
        return [order[start : start + self.rows].tolist() for start in range(0, len(order), self.rows)]


class PaddedStep:
    """Model and optimizer of transformers and torch in this process, with the weights of a Hugging Face folder.

    The log-probs are those at temperature 1, the loss is this project's own. Entropy is not computed.
    """

    def __init__(
        self,
        folder: Path,
        settings: PaddedSettings,
        algorithm: AlgorithmConfig,
        optimizer: OptimizerConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).train()
        self.settings, self.algorithm, self.device = settings, algorithm, device
        self.max_grad_norm = optimizer.max_grad_norm
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optimizer.weight_decay},
                {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
            ],
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_eps,
        )

    def share(self, settings: PaddedSettings) -> PaddedStep:
        """Another loop over the same model and optimizer."""
        other = copy.copy(self)
        other.settings = settings
        return other

    def logprobs(self, batch: TrainingBatch) -> np.ndarray:
        """Log-probs of all response tokens in sample order, [R] in the type that the loss is computed in."""
        values: dict[int, np.ndarray] = {}
        with torch.no_grad():
            for samples, rows in self._micro_batches(batch):
                found = self._logprobs(rows)
                for sample, row, mask in zip(samples, found, rows.response_mask, strict=True):
                    values[sample] = row[mask].numpy(force=True)
        return np.concatenate([values[sample] for sample in range(batch.num_samples)])

    def gradients(self, batch: TrainingBatch) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss over the whole batch, one mini-batch, and its gradient by name, which is left in the parameters."""
        self.optimizer.zero_grad()
        loss_sum, denominator = 0.0, 0
        for _, rows in self._micro_batches(batch):
            output = fipo_loss(
                self._logprobs(rows), rows.old_logprobs, rows.advantages, rows.response_mask, self.algorithm
            )
            output.loss_sum.backward()
            loss_sum += output.loss_sum.item()
            denominator += int(output.denominator)
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        for grad in grads.values():  # known only now: the loss may leave whole sequences out
            grad /= max(denominator, 1)
        return loss_sum / max(denominator, 1), grads

    def update(self, batch: TrainingBatch, lr: float) -> None:
        """One optimizer step over the whole batch."""
        self.gradients(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def _micro_batches(self, batch: TrainingBatch) -> Iterator[tuple[list[int], PaddedRows]]:
        self.model.set_attn_implementation(self.settings.attention)
        for samples in self.settings.micro_batches(np.diff(batch.cu_seqlens)):
            yield samples, pad_rows(batch, samples, self.device)

    def _logprobs(self, rows: PaddedRows) -> torch.Tensor:
        """Of every target [B, L - 1], whatever it is; float32, or float64 where the model computes in that."""
        output = self.model(rows.token_ids, attention_mask=rows.attention_mask, use_cache=False)
        logits = output.logits[:, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(-1).gather(-1, rows.token_ids[:, 1:, None])[..., 0]


def pad_rows(batch: TrainingBatch, samples: Sequence[int], device: torch.device) -> PaddedRows:
    """The micro-batch of these samples, in this order."""
    lengths = np.diff(batch.cu_seqlens)
    response_starts = np.concatenate([[0], np.cumsum(lengths - batch.prompt_lens)])
    longest = int(lengths[samples].max())
    token_ids = np.full((len(samples), longest), PAD_ID, np.int64)
    attention_mask = np.zeros((len(samples), longest), np.int64)
    response_mask = np.zeros((len(samples), longest - 1), bool)
    old_logprobs = np.zeros((len(samples), longest - 1), np.float32)
    for row, sample in enumerate(samples):
        length, prompt = int(lengths[sample]), int(batch.prompt_lens[sample])
        token_ids[row, :length] = batch.token_ids[batch.cu_seqlens[sample] :][:length]
        attention_mask[row, :length] = 1
        response_mask[row, prompt - 1 : length - 1] = True
        if batch.old_logprobs is not None:
            old = batch.old_logprobs[response_starts[sample] : response_starts[sample + 1]]
            old_logprobs[row, prompt - 1 : length - 1] = old
    advantages = np.repeat(batch.advantages[samples, None], longest - 1, axis=1)
    arrays = (token_ids, attention_mask, response_mask, advantages, old_logprobs)
    return PaddedRows(*(torch.from_numpy(array).to(device) for array in arrays))
