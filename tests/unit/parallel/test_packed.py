"""The packed microbatch against the padded rows of the same samples, and against hand-made ones."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.parallel.packed import PackedTokens, make_packed_tokens, merge_response_rows
from fipo_megatron.parallel.plan import PackingUnits
from fipo_megatron.types import TrainingBatch
from tests.unit.parallel.padded_rows import MicrobatchPlan, make_padded_rows

# Three samples: prompt | response
BATCH = TrainingBatch(
    token_ids=np.array([1, 2, 10, 11, 12, 3, 20, 4, 5, 6, 30, 31]),
    cu_seqlens=np.array([0, 5, 7, 12]),
    prompt_lens=np.array([2, 1, 3]),
    advantages=np.array([0.5, -1.0, 2.0], np.float32),
    old_logprobs=np.array([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6], np.float32),
)
RESPONSE_FIELDS = ("targets", "advantages", "old_logprobs", "ref_logprobs")


def make_batch(lens: list[tuple[int, int]]) -> TrainingBatch:
    """Samples of (prompt, response) tokens; no two response rows have the same values."""
    prompts, responses = np.array(lens).T
    num_tokens, num_rows = int((prompts + responses).sum()), int(responses.sum())
    generator = np.random.default_rng(num_tokens)
    return TrainingBatch(
        token_ids=generator.permutation(num_tokens) + 1,
        cu_seqlens=np.cumsum([0, *(prompts + responses)]),
        prompt_lens=prompts,
        advantages=generator.standard_normal(len(lens)).astype(np.float32),
        old_logprobs=generator.standard_normal(num_rows).astype(np.float32),
        ref_logprobs=generator.standard_normal(num_rows).astype(np.float32),
        loss_mask=generator.random(num_rows) > 0.3,
    )


def test_three_samples_by_hand():
    packed = make_packed_tokens(BATCH, [2, 0, 1], PackingUnits())
    assert packed.tokens.tolist() == [4, 5, 6, 30, 1, 2, 10, 11, 3]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert (packed.cu_seqlens.tolist(), packed.cu_seqlens.dtype) == ([0, 4, 8, 9], torch.int32)
    assert packed.response_index.tolist() == [2, 3, 5, 6, 7, 8]
    assert packed.batch_rows.tolist() == [4, 5, 0, 1, 2, 3]
    assert packed.targets.tolist() == [30, 31, 10, 11, 12, 20]
    assert packed.advantages.tolist() == [2, 2, 0.5, 0.5, 0.5, -1]
    np.testing.assert_array_equal(packed.old_logprobs, np.float32([-0.5, -0.6, -0.1, -0.2, -0.3, -0.4]))
    assert packed.loss_mask.tolist() == [True] * 6
    assert packed.ref_logprobs is None
    assert packed.segments.cu_seqlens.tolist() == [0, 2, 5, 6]
    assert packed.segments.cu_chunks is None


def test_zigzag_chunks_by_hand():
    """Two sequences of 8 and 4 positions and 4 of padding: chunks of 2, 1 and 1 over two ranks, in parts of 2 * 4."""
    batch = make_batch([(3, 3), (1, 2)])
    first, second = (make_packed_tokens(batch, [0, 1], PackingUnits(2, 4), rank) for rank in range(2))
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 8, 12, 16]
    ids = batch.token_ids
    assert first.tokens.tolist() == [ids[0], ids[1], 0, 0, ids[6], 0, 0, 0]
    assert second.tokens.tolist() == [ids[2], ids[3], ids[4], 0, ids[7], 0, 0, 0]
    assert first.position_ids.tolist() == [0, 1, 6, 7, 0, 3, 0, 3]
    # Rows of the first sequence: positions 2, 3, 4, all on the second rank; of the second: 0 and 1, one on each
    assert (first.response_index.tolist(), second.response_index.tolist()) == ([4], [0, 1, 2, 4])
    assert (first.segments.cu_seqlens.tolist(), second.segments.cu_seqlens.tolist()) == ([0, 0, 1], [0, 3, 4])
    assert first.segments.cu_chunks is not None
    assert second.segments.cu_chunks is not None
    assert first.segments.cu_chunks.tolist() == [0, 0, 0, 1, 1]
    assert second.segments.cu_chunks.tolist() == [0, 2, 3, 4, 4]


def padded_row(batch: TrainingBatch, sample: int, length: int, rank: int, units: PackingUnits) -> dict[str, np.ndarray]:
    plan = MicrobatchPlan(microbatches=((sample,),), num_rows=1, num_columns=length)
    rows = make_padded_rows(batch, plan, 0, context_rank=rank, context_size=units.context_size)
    return {key: value[0].numpy() for key, value in vars(rows).items() if isinstance(value, torch.Tensor)}


@given(
    lens=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    context_size=st.sampled_from([1, 2, 4]),
    tensor_size=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_holds_what_padded_rows_hold(lens, context_size, tensor_size, seed):
    batch, units = make_batch(lens), PackingUnits(context_size, tensor_size)
    samples = np.random.default_rng(seed).permutation(len(lens))[: 1 + seed % len(lens)].tolist()
    multiple = 2 * context_size if context_size > 1 else 1
    lengths = [-(-(sum(lens[i]) - 1) // multiple) * multiple for i in samples]
    for rank in range(context_size):
        packed = make_packed_tokens(batch, samples, units, rank)
        rows = [padded_row(batch, i, length, rank, units) for i, length in zip(samples, lengths, strict=True)]
        expected = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        size = sum(lengths) // context_size
        assert len(packed.tokens) % tensor_size == 0
        assert size <= len(packed.tokens) < size + max(tensor_size, 2)
        np.testing.assert_array_equal(packed.tokens[:size], expected["tokens"])
        assert not packed.tokens[size:].any()
        np.testing.assert_array_equal(packed.position_ids[:size], expected["position_ids"])
        is_response = expected["response_mask"]
        np.testing.assert_array_equal(packed.response_index, np.flatnonzero(is_response))
        for key in RESPONSE_FIELDS:
            np.testing.assert_array_equal(getattr(packed, key), expected[key][is_response])
        assert packed.loss_mask.tolist() == batch.loss_mask[packed.batch_rows.numpy()].tolist()
        assert packed.cu_seqlens.tolist()[: len(samples) + 1] == np.cumsum([0, *lengths]).tolist()
        assert packed.cu_seqlens[-1] == len(packed.tokens) * context_size
        check_segments(packed, rows)


def check_segments(packed: PackedTokens, rows: list[dict[str, np.ndarray]]) -> None:
    """Each segment is a sample's rows here, and each zig-zag chunk its half of the local positions."""
    assert np.diff(packed.segments.cu_seqlens).tolist() == [row["response_mask"].sum() for row in rows]
    if packed.segments.cu_chunks is not None:
        halves = [half.sum() for row in rows for half in np.split(row["response_mask"], 2)]
        assert np.diff(packed.segments.cu_chunks).tolist() == halves


@pytest.mark.parametrize(("units", "size"), [((1, 1), 1), ((1, 4), 4), ((4, 1), 2), ((2, 8), 8)])
def test_an_empty_microbatch_still_has_positions(units, size):
    packed = make_packed_tokens(BATCH, [], PackingUnits(*units))
    assert packed.tokens.tolist() == [0] * size
    assert packed.cu_seqlens.tolist() == [0, size * units[0]]
    assert all(len(getattr(packed, key)) == 0 for key in ("response_index", "batch_rows", "loss_mask", "advantages"))
    assert packed.segments.num_segments == 0


def test_a_prompt_may_fill_all_chunks_of_a_rank():
    batch = make_batch([(61, 3)])
    counts = [len(make_packed_tokens(batch, [0], PackingUnits(4), rank).batch_rows) for rank in range(4)]
    assert counts == [3, 0, 0, 0]


def test_rows_come_back_in_sample_order():
    batch, units = make_batch([(2, 9), (30, 1), (7, 20), (1, 1), (3, 4)]), PackingUnits(2, 2)
    microbatches = [(3, 1), (), (2,), (4, 0)]
    parts = [make_packed_tokens(batch, samples, units, rank) for samples in microbatches for rank in (1, 0)]
    found = [(part.batch_rows.numpy(), part.old_logprobs.numpy()) for part in parts]
    merged = merge_response_rows(found)
    np.testing.assert_array_equal(merged, batch.old_logprobs)
    assert merged.dtype == np.float32
    inner = next(i for i, (rows, _) in enumerate(found) if len(rows) and 34 not in rows)
    lost = len(found[inner][0])
    with pytest.raises(ValueError, match=f"of 35 response rows {lost} are missing and 0 came more than"):
        merge_response_rows(found[:inner] + found[inner + 1 :])
    with pytest.raises(ValueError, match=f"of 35 response rows 0 are missing and {len(found[-1][0])} came more than"):
        merge_response_rows([*found, found[-1]])


def test_moving_to_a_device_leaves_the_segments():
    packed = make_packed_tokens(BATCH, [0], PackingUnits(2))
    moved = packed.to(torch.device("meta"))
    tensors = [getattr(moved, f.name) for f in fields(moved)]
    assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}
    assert moved.segments is packed.segments
    assert replace(moved, samples=()).samples == ()
