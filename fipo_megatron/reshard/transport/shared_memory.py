"""Buckets in memory that both ends map: for processes of one machine, on a CPU.

The buckets are an unnamed file in memory, handed over through the socket: when both processes are gone, so is it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fipo_megatron.reshard.transport.base import NUM_SLOTS
from fipo_megatron.reshard.transport.peer_sockets import FILLED, RELEASED, PeerSockets

CACHED_BUCKET_BYTES = 4 << 20  # a larger bucket leaves the caches before its reader comes


def socket_path(folder: Path, source: int) -> Path:
    """Where a trainer rank listens until its destinations have come."""
    return folder / f"source-{source}.sock"


class SharedMemoryTransport:
    """One end. `bucket_bytes` is cut to what stays in the caches; both ends have to be given the same."""

    min_direct_bytes: int | None = None

    def __init__(self, sockets: PeerSockets, peers: Sequence[int], bucket_bytes: int) -> None:
        self.bucket_bytes = min(bucket_bytes, CACHED_BUCKET_BYTES)
        self.sent_bytes = self.received_bytes = 0
        self._sockets, self._peers = sockets, tuple(peers)
        self._buffers: dict[int, tuple[torch.Tensor, ...]] = {}
        self._rounds: list[dict[int, int]] = [{} for _ in range(NUM_SLOTS)]  # sizes of the round under way

    def buffers(self, peer: int) -> tuple[torch.Tensor, ...]:
        return self._buffers[peer]

    def close(self) -> None:
        self._sockets.close()
        self._buffers = {}  # the memory is unmapped with the last view of it

    def _map(self, peer: int, file_descriptor: int) -> None:
        try:
            memory = mmap.mmap(file_descriptor, NUM_SLOTS * self.bucket_bytes)
        finally:
            os.close(file_descriptor)
        self._buffers[peer] = torch.frombuffer(memory, dtype=torch.uint8).split(self.bucket_bytes)


class SharedMemorySender(SharedMemoryTransport):
    """The end of a trainer rank: waits until all its destinations have connected.

    Raises:
        ConnectionError: one did not come within `timeout_s`.
    """

    def __init__(
        self, folder: Path, source: int, destinations: Sequence[int], bucket_bytes: int, timeout_s: float
    ) -> None:
        super().__init__(PeerSockets("engine worker", timeout_s), destinations, bucket_bytes)
        self._sockets.accept(socket_path(folder, source), destinations)
        for peer in destinations:
            memory = _make_memory(NUM_SLOTS * self.bucket_bytes)
            try:
                self._sockets.send_handles(peer, {"bucket_bytes": self.bucket_bytes}, [memory])
            except BaseException:
                os.close(memory)
                raise
            self._map(peer, memory)
            for buffer in self._buffers[peer]:
                buffer.zero_()  # its pages are made now, not in the first sync

    def start(self, slot: int, sizes: Mapping[int, int], direct: Mapping[int, Sequence[torch.Tensor]]) -> None:
        self._rounds[slot] = dict(sizes)
        for peer, size in sizes.items():
            self._sockets.tell(peer, FILLED, slot, size)
            self.sent_bytes += size

    def wait(self, slot: int) -> None:
        sizes, self._rounds[slot] = self._rounds[slot], {}
        self._sockets.hear(list(sizes), RELEASED, slot, list(sizes.values()))

    def release(self, slot: int) -> None:
        """Nothing: a sender waits."""


class SharedMemoryReceiver(SharedMemoryTransport):
    """The end of an engine worker: connects to its sources.

    Raises:
        ConnectionError: one could not be reached within `timeout_s`, or has other buckets.
    """

    def __init__(
        self, folder: Path, destination: int, sources: Sequence[int], bucket_bytes: int, timeout_s: float
    ) -> None:
        super().__init__(PeerSockets("trainer rank", timeout_s), sources, bucket_bytes)
        for peer in sources:
            self._sockets.connect(socket_path(folder, peer), peer, destination)
        for peer in sources:
            values, (memory,) = self._sockets.receive_handles(peer)
            if values["bucket_bytes"] != self.bucket_bytes:
                os.close(memory)
                raise ConnectionError(f"trainer rank {peer} has buckets of {values['bucket_bytes']} bytes")
            self._map(peer, memory)

    def start(self, slot: int, sizes: Mapping[int, int], direct: Mapping[int, Sequence[torch.Tensor]]) -> None:
        self._rounds[slot] = dict(sizes)

    def wait(self, slot: int) -> None:
        sizes = self._rounds[slot]
        self._sockets.hear(list(sizes), FILLED, slot, list(sizes.values()))
        self.received_bytes += sum(sizes.values())

    def release(self, slot: int) -> None:
        for peer, size in self._rounds[slot].items():
            self._sockets.tell(peer, RELEASED, slot, size)


def _make_memory(size: int) -> int:
    """The file descriptor of unnamed memory whose size no process can change: reading it can't fault."""
    memory = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, size)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return memory
