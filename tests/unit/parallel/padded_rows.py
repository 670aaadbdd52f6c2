"""Microbatches as right-padded rows: the slow twin of packed tokens, and their oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fipo_megatron.parallel.context import zigzag_positions
from fipo_megatron.types import TrainingBatch


@dataclass(frozen=True)
class MicrobatchPlan:
    """What one data-parallel rank computes for a mini-batch: equal shapes, as a pipeline needs them."""

    microbatches: tuple[tuple[int, ...], ...]  # sample indices; the last may hold fewer than num_rows
    num_rows: int  # B of every microbatch
    num_columns: int  # L of every microbatch, before context parallelism


@dataclass(frozen=True)
class PaddedRows:
    """One microbatch of right-padded rows. Column t holds token t of a sample and speaks of token t + 1, its target.

    Shapes `[B, L]`; under context parallelism `[B, L / cp]`, this rank's two zig-zag chunks of every row.
    """

    samples: tuple[int, ...]  # sample index of each row; rows beyond are padding
    tokens: torch.Tensor  # int64
    targets: torch.Tensor  # int64
    position_ids: torch.Tensor  # int64
    response_mask: torch.Tensor  # bool: the target is a response token
    advantages: torch.Tensor  # float32, one value a row
    old_logprobs: torch.Tensor  # float32, zeros where the batch has none
    ref_logprobs: torch.Tensor | None  # float32


def make_padded_rows(
    batch: TrainingBatch, plan: MicrobatchPlan, microbatch: int, *, context_rank: int = 0, context_size: int = 1
) -> PaddedRows:
    """The rows of one microbatch of a plan, cut for context-parallel rank `context_rank`."""
    samples = plan.microbatches[microbatch]
    shape = (plan.num_rows, plan.num_columns)
    tokens, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    mask, advantages = np.zeros(shape, bool), np.zeros(shape, np.float32)
    per_token = {"old_logprobs": batch.old_logprobs, "ref_logprobs": batch.ref_logprobs}
    columns = {name: np.zeros(shape, np.float32) for name, values in per_token.items() if values is not None}
    response_starts = _response_starts(batch)
    for row, i in enumerate(samples):
        ids = batch.token_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        response = slice(int(batch.prompt_lens[i]) - 1, len(ids) - 1)
        tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        mask[row, response] = True
        advantages[row] = batch.advantages[i]
        for name, rows in columns.items():
            values = per_token[name]
            assert values is not None
            rows[row, response] = values[response_starts[i] : response_starts[i + 1]]
    positions = zigzag_positions([plan.num_columns], context_rank, context_size)

    def local(full: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(full)[:, positions].contiguous()

    return PaddedRows(
        samples=samples,
        tokens=local(tokens),
        targets=local(targets),
        position_ids=positions.expand(plan.num_rows, -1).contiguous(),
        response_mask=local(mask),
        advantages=local(advantages),
        old_logprobs=local(columns.get("old_logprobs", np.zeros(shape, np.float32))),
        ref_logprobs=local(columns["ref_logprobs"]) if "ref_logprobs" in columns else None,
    )


def _response_starts(batch: TrainingBatch) -> np.ndarray:
    response_lens = np.diff(batch.cu_seqlens) - batch.prompt_lens
    return np.concatenate([[0], np.cumsum(response_lens)])
