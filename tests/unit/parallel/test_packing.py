from __future__ import annotations

import numpy as np
import pytest

from fipo_megatron.parallel.packing import make_padded_rows, plan_microbatches
from fipo_megatron.types import TrainingBatch

# Three samples: prompt | response
BATCH = TrainingBatch(
    token_ids=np.array([1, 2, 10, 11, 12, 3, 20, 4, 5, 6, 30, 31]),
    cu_seqlens=np.array([0, 5, 7, 12]),
    prompt_lens=np.array([2, 1, 3]),
    advantages=np.array([0.5, -1.0, 2.0], np.float32),
    old_logprobs=np.array([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6], np.float32),
)
LENS = np.diff(BATCH.cu_seqlens)


@pytest.mark.parametrize(
    ("data_rank", "data_size", "microbatch_samples", "multiple", "expected"),
    [
        (0, 1, 8, 1, (((0, 1, 2),), 3, 4)),
        (0, 1, 2, 1, (((0, 1), (2,)), 2, 4)),
        (0, 2, 8, 1, (((0, 2),), 2, 4)),
        (1, 2, 8, 1, (((1,),), 1, 1)),
        (0, 1, 8, 8, (((0, 1, 2),), 3, 8)),
    ],
)
def test_plan(data_rank: int, data_size: int, microbatch_samples: int, multiple: int, expected: tuple) -> None:
    plan = plan_microbatches(
        range(3),
        LENS,
        data_rank=data_rank,
        data_size=data_size,
        microbatch_samples=microbatch_samples,
        column_multiple=multiple,
    )
    assert (plan.microbatches, plan.num_rows, plan.num_columns) == expected


def test_ranks_share_the_mini_batch_without_overlap() -> None:
    samples = list(range(37))
    lens = np.full(37, 10)
    shares = [
        plan_microbatches(samples, lens, data_rank=r, data_size=4, microbatch_samples=3).microbatches for r in range(4)
    ]
    assert sorted(i for share in shares for microbatch in share for i in microbatch) == samples
    assert all(len(microbatch) <= 3 for share in shares for microbatch in share)


def test_column_t_speaks_of_token_t_plus_1() -> None:
    rows = make_padded_rows(BATCH, plan_microbatches(range(3), LENS, data_rank=0, data_size=1, microbatch_samples=2), 0)
    assert rows.tokens.tolist() == [[1, 2, 10, 11], [3, 0, 0, 0]]
    assert rows.targets.tolist() == [[2, 10, 11, 12], [20, 0, 0, 0]]
    assert rows.response_mask.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert rows.advantages.tolist() == [[0.5] * 4, [-1.0] * 4]
    np.testing.assert_allclose(rows.old_logprobs, [[0, -0.1, -0.2, -0.3], [-0.4, 0, 0, 0]])
    assert rows.ref_logprobs is None


def test_the_last_microbatch_is_padded_with_empty_rows() -> None:
    rows = make_padded_rows(BATCH, plan_microbatches(range(3), LENS, data_rank=0, data_size=1, microbatch_samples=2), 1)
    assert rows.samples == (2,)
    assert rows.tokens.shape == (2, 4)
    assert rows.response_mask.sum(1).tolist() == [2, 0]


def test_context_ranks_hold_zigzag_chunks_of_every_row() -> None:
    plan = plan_microbatches([0], LENS, data_rank=0, data_size=1, microbatch_samples=1, column_multiple=4)
    first, second = (make_padded_rows(BATCH, plan, 0, context_rank=r, context_size=2) for r in range(2))
    assert (first.tokens.tolist(), first.position_ids.tolist()) == ([[1, 11]], [[0, 3]])
    assert (second.tokens.tolist(), second.position_ids.tolist()) == ([[2, 10]], [[1, 2]])
