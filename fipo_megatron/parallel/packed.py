"""One microbatch as flat tokens without padding between them, and the way back. No process groups, no CUDA.

Position t of a sample holds its token t and speaks of token t + 1, its target. Only positions whose target is a
response token are response rows: their hidden states alone reach the head, and the loss sees nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from fipo_megatron.parallel.context import zigzag_positions
from fipo_megatron.parallel.plan import PackingUnits
from fipo_megatron.types import SegmentTable, TrainingBatch

# Where response rows stand in the batch's response arrays, int64 [R], and a value of each, float32 [R].
ResponseRows = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class PackedTokens:
    """One context-parallel rank's part of a microbatch of T positions over all cp ranks, of which R are response rows.

    Sequences are the samples, each padded at its end to the multiple that zig-zag chunks need, and behind them one of
    padding alone, where the total has to be longer. Attention is causal, so no token of a sample sees padding.
    """

    samples: tuple[int, ...]  # sample index of each sequence; empty where this microbatch only joins collectives
    tokens: torch.Tensor  # int64 [T / cp]
    position_ids: torch.Tensor  # int64 [T / cp], from 0 in every sequence
    cu_seqlens: torch.Tensor  # int32 [num_sequences + 1], boundaries of the padded sequences over all cp ranks, last T
    # Response rows, in local order; all but the first are what the loss reads
    response_index: torch.Tensor  # int64 [R], where they stand in `tokens`
    batch_rows: torch.Tensor  # int64 [R], where they stand in the batch's response arrays
    targets: torch.Tensor  # int64 [R]
    loss_mask: torch.Tensor  # bool [R]
    advantages: torch.Tensor  # float32 [R]
    old_logprobs: torch.Tensor  # float32 [R], zeros where the batch has none
    ref_logprobs: torch.Tensor | None  # float32 [R]
    segments: SegmentTable  # of the response rows, a segment a sample; stays on the CPU

    def to(self, device: torch.device) -> PackedTokens:
        """The same tokens on a device."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def make_packed_tokens(
    batch: TrainingBatch, samples: Sequence[int], units: PackingUnits, context_rank: int = 0
) -> PackedTokens:
    """The part of context-parallel rank `context_rank` in the microbatch of these samples, in this order."""
    chosen = list(samples)
    response_starts = _response_starts(batch)
    sample_lens = np.diff(batch.cu_seqlens)[chosen]
    lens = units.sequence_lens(sample_lens)
    total = units.total_len(int(lens.sum()))
    tokens, batch_rows = np.zeros(total, np.int64), np.full(total, -1)
    for i, n, start in zip(chosen, sample_lens - 1, np.cumsum(lens) - lens, strict=True):
        tokens[start : start + n] = batch.token_ids[batch.cu_seqlens[i] :][:n]
        batch_rows[start + batch.prompt_lens[i] - 1 : start + n] = np.arange(response_starts[i], response_starts[i + 1])
    sequence_lens = [n for n in (*lens.tolist(), total - int(lens.sum())) if n > 0]

    positions = zigzag_positions(sequence_lens, context_rank, units.context_size)
    local_rows = torch.from_numpy(batch_rows)[positions]
    is_response = local_rows >= 0
    rows = local_rows[is_response].numpy()
    owners = np.searchsorted(response_starts, rows, side="right") - 1

    def at_rows(values: np.ndarray | None, default: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(default if values is None else values[rows])

    return PackedTokens(
        samples=tuple(chosen),
        tokens=torch.from_numpy(tokens)[positions],
        position_ids=torch.cat([torch.arange(n) for n in sequence_lens])[positions],
        cu_seqlens=torch.tensor([0, *np.cumsum(sequence_lens)], dtype=torch.int32),
        response_index=is_response.nonzero().squeeze(1),
        batch_rows=local_rows[is_response],
        # Before response row r of the batch stand r response tokens and the prompts up to that of its own sample
        targets=torch.from_numpy(batch.token_ids[rows + np.cumsum(batch.prompt_lens)[owners]]),
        loss_mask=at_rows(batch.loss_mask, np.ones(len(rows), bool)),
        advantages=torch.from_numpy(batch.advantages[owners]),
        old_logprobs=at_rows(batch.old_logprobs, np.zeros(len(rows), np.float32)),
        ref_logprobs=None if batch.ref_logprobs is None else torch.from_numpy(batch.ref_logprobs[rows]),
        segments=_response_segments(is_response, torch.from_numpy(lens), units),
    )


def merge_response_rows(parts: Iterable[ResponseRows]) -> np.ndarray:
    """Values of all response rows in sample order, float32 [R], from those of every microbatch of all data- and
    context-parallel ranks, in any order.

    Raises:
        ValueError: a row is missing or was computed twice.
    """
    rows, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    counts = np.bincount(rows)
    if (counts != 1).any():
        raise ValueError(
            f"of {len(counts)} response rows {(counts == 0).sum()} are missing and {(counts > 1).sum()} came more than "
            "once: pass the parts of all samples, each from one tensor-parallel rank of the last stage"
        )
    merged = np.empty(len(rows), np.float32)
    merged[rows] = values
    return merged


def _response_segments(is_response: torch.Tensor, sequence_lens: torch.Tensor, units: PackingUnits) -> SegmentTable:
    """The table of the response rows, of which a zig-zag chunk may have any number."""
    num_chunks = 2 if units.context_size > 1 else 1  # of a sequence, on this rank
    chunk_lens = (sequence_lens // (num_chunks * units.context_size)).repeat_interleave(num_chunks)
    cu_rows = pad(is_response.cumsum(0), (1, 0))
    cu_chunks = cu_rows[pad(chunk_lens.cumsum(0), (1, 0))]
    return SegmentTable(cu_chunks[::num_chunks].contiguous(), cu_chunks if num_chunks == 2 else None)


def _response_starts(batch: TrainingBatch) -> np.ndarray:
    response_lens = np.diff(batch.cu_seqlens) - batch.prompt_lens
    return np.concatenate([[0], np.cumsum(response_lens)])
