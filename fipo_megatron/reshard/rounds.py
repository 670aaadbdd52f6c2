"""How the transfers between two processes are cut into rounds of one bucket: from the plan alone, so at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fipo_megatron.reshard.boxes import Box
from fipo_megatron.reshard.plan import Transfer

TRAILER = -1  # instead of a transfer's number


class RoundPiece(NamedTuple):
    """Rows of one transfer, or bytes of the trailer, in one round."""

    transfer: int  # its number in the stream, or TRAILER
    row: int  # within the transfer's box
    rows: int
    offset: int  # bytes; its place in the bucket
    num_bytes: int
    is_direct: bool  # a message of its own: its place in the bucket is used only where it can't stay where it is

    def box(self, of_transfer: Box) -> Box:
        """Its part of a transfer's box."""
        return of_transfer._replace(row=of_transfer.row + self.row, rows=self.rows)


Round = list[RoundPiece]


def cut_rounds(
    transfers: Sequence[Transfer], itemsize: int, trailer_bytes: int, bucket_bytes: int, min_direct_bytes: int | None
) -> list[Round]:
    """The rounds of a stream: the transfers in their order, cut at rows where a bucket is full, then the trailer.

    Packed pieces fill a bucket from its beginning, direct ones have their places from its end.

    Raises:
        ValueError: a row is larger than a bucket.
    """
    rounds: list[Round] = []
    packed = direct = bucket_bytes  # bytes of the last round: none is begun
    for number, transfer in enumerate(transfers):
        row_bytes, row = transfer.hf_box.columns * itemsize, 0
        if row_bytes > bucket_bytes:
            raise ValueError(
                f"sync.bucket_mib: a row of {transfer.hf_name} ({row_bytes} bytes) is larger than one peer's bucket "
                f"({bucket_bytes} bytes)"
            )
        while row < transfer.hf_box.rows:
            if packed + direct + row_bytes > bucket_bytes:
                rounds.append([])
                packed = direct = 0
            rows = min(transfer.hf_box.rows - row, (bucket_bytes - packed - direct) // row_bytes)
            num_bytes = rows * row_bytes
            is_direct = min_direct_bytes is not None and num_bytes >= min_direct_bytes
            if is_direct:
                direct += num_bytes
            offset = bucket_bytes - direct if is_direct else packed
            packed += 0 if is_direct else num_bytes
            rounds[-1].append(RoundPiece(number, row, rows, offset, num_bytes, is_direct))
            row += rows
    for start in range(0, trailer_bytes, bucket_bytes):
        size = min(bucket_bytes, trailer_bytes - start)
        rounds.append([RoundPiece(TRAILER, start, size, 0, size, False)])
    return rounds
