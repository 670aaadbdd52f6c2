"""What moves bytes between trainer ranks and engine workers, round by round through preallocated buckets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

NUM_SLOTS = 2  # buckets of a peer: one travels while the other is packed, or unpacked
ALIGNMENT = 64  # bytes; of buckets


class Transport(Protocol):
    """One end: a sender whose peers are destinations, or a receiver whose peers are sources.

    Rounds take the slots in turns, and both ends derive their sizes from the plan. A sender waits for a slot, writes
    its buffers and starts the round; a receiver starts a round, waits for it, reads the buffers and releases the slot.
    Every method raises ConnectionError, which names the peer, when a peer died or said nothing for `timeout_s`.
    """

    bucket_bytes: int
    min_direct_bytes: int | None  # of a piece that may travel from and to where it lives; None: all through buckets
    sent_bytes: int  # since the beginning
    received_bytes: int

    def buffers(self, peer: int) -> tuple[torch.Tensor, ...]:
        """NUM_SLOTS uint8 tensors [bucket_bytes], the same ones at every call."""
        ...

    def start(self, slot: int, sizes: Mapping[int, int], direct: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Begin a round: of each peer the first bytes of its buffer, then its `direct` tensors (uint8, contiguous).

        `direct` is empty where `min_direct_bytes` is None.
        """
        ...

    def wait(self, slot: int) -> None:
        """Sender: the slot's round has left, so its buffers may be written. Receiver: it has arrived."""
        ...

    def release(self, slot: int) -> None:
        """Receiver: the slot's buffers were read and may be overwritten."""
        ...

    def close(self) -> None:
        """Give connections and buffers up; more than once does no harm."""
        ...


def bucket_size(budget_bytes: int, max_peers: int) -> int:
    """Bytes of a bucket so that those of all peers fit the budget of a process; the same on every process.

    Raises:
        ValueError: the budget is too small.
    """
    size = budget_bytes // (NUM_SLOTS * max_peers) // ALIGNMENT * ALIGNMENT
    if size < ALIGNMENT:
        raise ValueError(
            f"sync.bucket_mib: {budget_bytes} bytes are too few for {NUM_SLOTS} buckets of {max_peers} peers"
        )
    return size


@contextmanager
def naming_peer(name: str) -> Iterator[None]:
    """Turns what a backend raises when a peer is gone into a ConnectionError that names the peer."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if isinstance(error, ConnectionError) and name in str(error):
            raise
        reason = str(error).strip().splitlines()
        raise ConnectionError(f"{name} died or stalled: {reason[0] if reason else type(error).__name__}") from error
