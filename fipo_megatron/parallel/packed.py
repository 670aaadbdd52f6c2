"""Microbatches as packed tokens: samples one after the other without padding between them, and their response rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fipo_megatron.parallel.context import zigzag_positions
from fipo_megatron.types import SegmentTable, TrainingBatch


@dataclass(frozen=True)
class PackedTokens:
    """One microbatch on one rank. Position t of a sample holds token t and speaks of token t + 1, its target.

    `T` tokens: those of this context-parallel rank, two zig-zag chunks of every sample. `R` rows: the positions among
    them whose target is a response token. Only they reach the output layer.
    """

    samples: tuple[int, ...]  # sample indices, in order; empty: a microbatch of padding, which joins the collectives
    response_lens: tuple[int, ...]  # response tokens of each sample, over all context-parallel ranks
    padded_lens: tuple[int, ...]  # tokens of each sequence over all ranks; the last may be padding alone
    tokens: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], within its sample
    response_index: torch.Tensor  # int64 [R], where the rows stand in `tokens`
    response_positions: torch.Tensor  # int64 [R], which of the microbatch's response tokens, in sample order, each is
    segments: SegmentTable  # the rows of each sample
    targets: torch.Tensor  # int64 [R]
    loss_mask: torch.Tensor  # bool [R]
    advantages: torch.Tensor  # float32 [R]
    old_logprobs: torch.Tensor  # float32 [R], zeros where the batch has none
    ref_logprobs: torch.Tensor | None  # float32 [R]

    def to(self, device: torch.device) -> PackedTokens:
        """The same microbatch on a device; the segments' boundaries stay on the CPU."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def make_packed_tokens(
    batch: TrainingBatch,
    samples: Sequence[int],
    *,
    context_rank: int = 0,
    context_size: int = 1,
    tensor_multiple: int = 1,
) -> PackedTokens:
    """The samples as one rank's packed tokens.

    Every sample is padded to a multiple of 2 * cp (cp > 1), and the whole so that a rank's tokens are a multiple of
    `tensor_multiple`: the tensor-parallel size under sequence parallelism, else 1.
    """
    multiple = 1 if context_size == 1 else 2 * context_size
    starts = batch.cu_seqlens[:-1]
    sample_lens, response_starts = np.diff(batch.cu_seqlens), _response_starts(batch)
    padded_lens = [-(-(int(sample_lens[i]) - 1) // multiple) * multiple for i in samples]
    whole = multiple * tensor_multiple
    missing = -sum(padded_lens) % whole or (0 if padded_lens else whole)
    if missing:
        padded_lens.append(missing)

    num_tokens = sum(padded_lens)
    tokens, positions = np.zeros(num_tokens, np.int64), np.zeros(num_tokens, np.int64)
    response = np.full(num_tokens, -1)  # which response token of the microbatch a position speaks of
    taken, first = [np.zeros(0, np.int64)], 0  # taken: where the response tokens stand in the batch's flat arrays
    targets = [np.zeros(0, np.int64)]
    for i, start in zip(samples, np.cumsum([0, *padded_lens]), strict=False):
        ids = batch.token_ids[starts[i] : starts[i] + sample_lens[i]]
        tokens[start : start + len(ids) - 1] = ids[:-1]
        positions[start : start + len(ids) - 1] = np.arange(len(ids) - 1)
        prompt_len = int(batch.prompt_lens[i])
        num_rows = len(ids) - prompt_len
        response[start + prompt_len - 1 : start + len(ids) - 1] = np.arange(first, first + num_rows)
        taken.append(np.arange(response_starts[i], response_starts[i + 1]))
        targets.append(ids[prompt_len:])
        first += num_rows

    local = zigzag_positions(padded_lens, context_rank, context_size).numpy()
    index = np.flatnonzero(response[local] >= 0)
    rows = response[local[index]]
    flat = np.concatenate(taken)[rows]

    def of_rows(values: np.ndarray | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(values[flat])

    owners = np.repeat(np.asarray(samples, np.int64), [len(part) for part in taken[1:]])[rows]
    old_logprobs, loss_mask = of_rows(batch.old_logprobs), of_rows(batch.loss_mask)
    return PackedTokens(
        samples=tuple(samples),
        response_lens=tuple(len(part) for part in taken[1:]),
        padded_lens=tuple(padded_lens),
        tokens=torch.from_numpy(tokens[local]),
        position_ids=torch.from_numpy(positions[local]),
        response_index=torch.from_numpy(index),
        response_positions=torch.from_numpy(rows),
        segments=_count_rows(index, padded_lens, len(samples), context_size),
        targets=torch.from_numpy(np.concatenate(targets)[rows]),
        loss_mask=torch.ones(len(rows), dtype=torch.bool) if loss_mask is None else loss_mask,
        advantages=torch.from_numpy(batch.advantages[owners]),
        old_logprobs=torch.zeros(len(rows)) if old_logprobs is None else old_logprobs,
        ref_logprobs=of_rows(batch.ref_logprobs),
    )


def _count_rows(index: np.ndarray, padded_lens: Sequence[int], num_samples: int, context_size: int) -> SegmentTable:
    """The segments of the rows at local positions `index`: a sample each, of two chunks under context parallelism."""
    chunks_per_sample = 1 if context_size == 1 else 2
    chunk_lens = np.repeat(np.asarray(padded_lens) // (context_size * chunks_per_sample), chunks_per_sample)
    ends = np.concatenate([[0], np.cumsum(chunk_lens)])[: num_samples * chunks_per_sample + 1]
    boundaries = torch.from_numpy(np.searchsorted(index, ends))
    if chunks_per_sample == 1:
        return SegmentTable(boundaries)
    return SegmentTable(boundaries[::2], second_halves=boundaries[1::2])


def _response_starts(batch: TrainingBatch) -> np.ndarray:
    response_lens = np.diff(batch.cu_seqlens) - batch.prompt_lens
    return np.concatenate([[0], np.cumsum(response_lens)])
