"""Point-to-point messages in one process group of all trainer ranks and all engine workers: gloo or NCCL."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fipo_megatron.parallel.groups import make_store
from fipo_megatron.reshard.transport.base import NUM_SLOTS, naming_peer

MIN_DIRECT_BYTES = 256 << 10  # of a message that is worth more than the copy it saves
_TAG = 0  # messages between two processes stay in order


class CollectiveTransport:
    """One end: `sends` says which. Group ranks are those of the trainer, then the engines' workers.

    All `num_sources + num_destinations` processes must construct theirs: gloo connects everyone to everyone. Pieces of
    MIN_DIRECT_BYTES travel without a bucket where they are contiguous.

    Raises:
        ConnectionError: not all processes came within `timeout_s`.
    """

    min_direct_bytes: int | None = MIN_DIRECT_BYTES

    def __init__(
        self,
        address: str,
        port: int,
        *,
        number: int,
        sends: bool,
        peers: Sequence[int],
        num_sources: int,
        num_destinations: int,
        bucket_bytes: int,
        timeout_s: float,
        device: torch.device,
        listener: socket.socket | None = None,
    ) -> None:
        self.bucket_bytes = bucket_bytes
        self.sent_bytes = self.received_bytes = 0
        self._sends, self._device, self._timeout = sends, device, timedelta(seconds=timeout_s)
        self._first_peer, self._peer_kind = (num_sources, "engine worker") if sends else (0, "trainer rank")
        self._buffers = {
            peer: torch.zeros(NUM_SLOTS, bucket_bytes, dtype=torch.uint8, device=device).unbind() for peer in peers
        }
        self._works: list[list[tuple[int, Any]]] = [[] for _ in range(NUM_SLOTS)]
        self._starting: list[int] = [0] * NUM_SLOTS  # bytes of the round under way
        rank, size = number if sends else num_sources + number, num_sources + num_destinations
        with naming_peer("a process of the weight group"):
            self._store = make_store(address, port, size, timeout_s, listener)
            store = dist.PrefixStore("shards", self._store)
            self._group: Any = _make_group(store, rank, size, self._timeout, device)

    def buffers(self, peer: int) -> tuple[torch.Tensor, ...]:
        return self._buffers[peer]

    def start(self, slot: int, sizes: Mapping[int, int], direct: Mapping[int, Sequence[torch.Tensor]]) -> None:
        post = self._group.send if self._sends else self._group.recv
        works = self._works[slot]
        batched = self._device.type == "cuda"
        if batched:  # as batch_isend_irecv does for registered groups: one launch, in which no order can deadlock
            self._group._start_coalescing(self._device)
        num_bytes = 0
        peer = -1
        for peer in sorted(sizes.keys() | direct.keys()):
            messages = [self._buffers[peer][slot][: sizes[peer]]] if sizes.get(peer) else []
            messages += direct.get(peer, ())
            for message in messages:
                with naming_peer(self._name(peer)):
                    work = post([message], self._first_peer + peer, _TAG)
                num_bytes += message.numel()
                if not batched:
                    works.append((peer, work))
        if batched:
            works.append((peer, self._group._end_coalescing(self._device)))
        self._starting[slot] = num_bytes

    def wait(self, slot: int) -> None:
        works, self._works[slot] = self._works[slot], []
        for peer, work in works:
            with naming_peer(self._name(peer)):
                work.wait(self._timeout)
        if self._sends:
            self.sent_bytes += self._starting[slot]
        else:
            self.received_bytes += self._starting[slot]
        self._starting[slot] = 0

    def release(self, slot: int) -> None:
        """Nothing: the next round arrives where it is started."""

    def close(self) -> None:
        if self._group is not None and hasattr(self._group, "abort"):
            self._group.abort()
        self._group = None
        self._buffers = {}

    def _name(self, peer: int) -> str:
        return f"{self._peer_kind} {peer}"


def _make_group(store: dist.Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> Any:
    """A process group that this process's own default group need not know."""
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 2 * timeout  # torch's watchdog ends the process; a wait of ours raises before
    return dist.ProcessGroupNCCL(store, rank, size, options)
