"""Streams cut into rounds: every row once, in order, within a bucket, and the same wherever it is worked out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.reshard.boxes import Box
from fipo_megatron.reshard.plan import Transfer
from fipo_megatron.reshard.rounds import TRAILER, cut_rounds


def transfer(rows: int, columns: int) -> Transfer:
    box = Box(0, rows, 0, columns)
    return Transfer(0, 0, "tensor", "parameter", box, box, box)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8)), min_size=1, max_size=12),
    st.sampled_from((2, 4)),
    st.integers(4, 40).map(lambda n: 8 * n),
    st.sampled_from((None, 1, 24, 100)),
    st.integers(0, 100),
)
def test_every_row_has_its_place(sizes, itemsize, bucket_bytes, min_direct_bytes, trailer_words):
    transfers = [transfer(*size) for size in sizes]
    rounds = cut_rounds(transfers, itemsize, 8 * trailer_words, bucket_bytes, min_direct_bytes)
    rows = [[] for _ in transfers]
    trailer = []
    for pieces in rounds:
        taken = [(piece.offset, piece.offset + piece.num_bytes) for piece in pieces]
        assert all(0 <= start < end <= bucket_bytes for start, end in taken)
        assert all(a[1] <= b[0] for a, b in zip(sorted(taken), sorted(taken)[1:], strict=False))
        packed = sorted(span for span, piece in zip(taken, pieces, strict=True) if not piece.is_direct)
        assert not packed or (packed[0][0] == 0 and sum(end - start for start, end in packed) == packed[-1][1])
        for piece in pieces:
            (trailer if piece.transfer == TRAILER else rows[piece.transfer]).extend(
                range(piece.row, piece.row + piece.rows)
            )
            if piece.transfer == TRAILER:
                assert len(pieces) == 1
            else:
                assert piece.num_bytes == piece.rows * sizes[piece.transfer][1] * itemsize
                assert piece.is_direct == (min_direct_bytes is not None and piece.num_bytes >= min_direct_bytes)
    assert rows == [list(range(size[0])) for size in sizes]
    assert trailer == list(range(8 * trailer_words))


def test_the_boxes_of_a_piece():
    (pieces, _) = cut_rounds([transfer(10, 2)], 4, 0, 64, None)
    assert pieces[0].box(Box(5, 10, 3, 2)) == Box(5, 8, 3, 2)


def test_a_row_larger_than_a_bucket_is_refused():
    with pytest.raises(ValueError, match=r"sync.bucket_mib: a row of tensor \(40 bytes\) is larger .* \(32 bytes\)"):
        cut_rounds([transfer(1, 10)], 4, 8, 32, None)
