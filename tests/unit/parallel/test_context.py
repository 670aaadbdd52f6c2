import pytest
import torch

from fipo_megatron.parallel.context import zigzag_positions
from tests.parity.zigzag import merge_zigzag, split_zigzag


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(0, [0, 1, 6, 7, 8, 9, 10, 17, 18, 19]), (1, [2, 3, 4, 5, 11, 12, 13, 14, 15, 16])],
)
def test_two_sequences_over_two_ranks(rank, expected):
    assert zigzag_positions([8, 12], rank, 2).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 4])
def test_merge_undoes_split(size):
    padded_lens = [2 * size, 0, 6 * size]
    values = torch.randn(3, sum(padded_lens))
    parts = [split_zigzag(values, padded_lens, rank, size) for rank in range(size)]
    assert {part.shape for part in parts} == {(3, 8)}
    assert torch.equal(merge_zigzag(parts, padded_lens), values)


def test_every_rank_has_the_same_causal_work():
    positions = [zigzag_positions([48], rank, 4) for rank in range(4)]
    assert len({int(p.sum()) for p in positions}) == 1


def test_without_sequences():
    assert zigzag_positions([], 0, 2).tolist() == []


def test_refuses_unequal_chunks():
    with pytest.raises(ValueError, match="a sequence of 6 tokens has no 4 equal chunks"):
        zigzag_positions([8, 6], 0, 2)
