"""Every aggregation on numbers that can be added in the head."""

import pytest
import torch

from fipo_megatron.algorithm.reduction import count_per_segment, expand_to_tokens, reduce_loss
from fipo_megatron.types import SegmentTable

SEGMENTS = SegmentTable(torch.tensor([0, 3, 3, 5, 6]))  # the second is empty
KEPT = torch.tensor([True, False, True, True, True, False])  # nothing is kept in the fourth
LOSSES = torch.tensor([1.0, float("nan"), 3.0, 10.0, 20.0, float("nan")])


def test_segments():
    counts = count_per_segment(KEPT, SEGMENTS)
    assert counts.tolist() == [2, 0, 2, 0]
    assert expand_to_tokens(torch.tensor([7, 8, 9, 6]), SEGMENTS, 6).tolist() == [7, 7, 7, 9, 9, 6]


@pytest.mark.parametrize(
    ("aggregation", "loss_sum", "denominator"),
    [
        ("token-mean", 34.0, 4),
        ("seq-mean-token-mean", 2.0 + 15.0, 2),
        ("seq-mean-token-sum", 34.0, 2),
        ("seq-mean-token-sum-norm", 3.4, 0),
    ],
)
def test_aggregations(aggregation, loss_sum, denominator):
    counts = count_per_segment(KEPT, SEGMENTS)
    found = reduce_loss(LOSSES, KEPT, counts, SEGMENTS, aggregation, sequence_norm=10)
    assert found[0].item() == pytest.approx(loss_sum)
    assert (found[1].item(), found[1].dtype) == (denominator, torch.int64)


@pytest.mark.parametrize("sequence_norm", [None, 0, -1])
def test_norm_needs_its_constant(sequence_norm):
    counts = count_per_segment(KEPT, SEGMENTS)
    with pytest.raises(ValueError, match=f"sequence_norm={sequence_norm}"):
        reduce_loss(LOSSES, KEPT, counts, SEGMENTS, "seq-mean-token-sum-norm", sequence_norm)
