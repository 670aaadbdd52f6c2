"""Buckets on a GPU that both ends map by CUDA IPC: for processes that see the same devices of one machine.

The bug of this way is a bucket that is written again while its reader's copy is still queued. Here a message says only
that an event was recorded, and the other end's stream waits for that event before it touches the bucket: the reader's
stream for the sender's copies into it, the sender's for the reader's copies out of it. No host waits for a device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fipo_megatron.reshard.transport.base import NUM_SLOTS
from fipo_megatron.reshard.transport.peer_sockets import FILLED, RELEASED, PeerSockets
from fipo_megatron.reshard.transport.shared_memory import socket_path

HANDLE_BYTES = 64  # of cudaIpcMemHandle_t


class CudaIpcTransport:
    """One end. Buckets belong to the sender, whose memory is its own: no allocator has to be told of it."""

    min_direct_bytes: int | None = None

    def __init__(self, sockets: PeerSockets, peers: Sequence[int], bucket_bytes: int, device: torch.device) -> None:
        self.bucket_bytes, self.device = bucket_bytes, device
        self.sent_bytes = self.received_bytes = 0
        self._sockets, self._memory = sockets, CudaMemory(device)
        self._buffers: dict[int, tuple[torch.Tensor, ...]] = {}
        self._rounds: list[dict[int, int]] = [{} for _ in range(NUM_SLOTS)]
        # By peer, of each slot: recorded by us, and by the peer.
        self._own_events: dict[int, list[Any]] = {}
        self._peer_events: dict[int, list[Any]] = {}
        for peer in peers:
            self._own_events[peer] = [self._memory.make_event() for _ in range(NUM_SLOTS)]

    def buffers(self, peer: int) -> tuple[torch.Tensor, ...]:
        return self._buffers[peer]

    def close(self) -> None:
        self._sockets.close()
        self._buffers = {}
        self._memory.close()

    def _exchange(self, peer: int, bucket_handle: str | None) -> None:
        events = [self._memory.event_handle(event).hex() for event in self._own_events[peer]]
        self._sockets.send_handles(peer, {"bucket_bytes": self.bucket_bytes, "bucket": bucket_handle, "events": events})

    def _adopt(self, peer: int) -> str | None:
        """The peer's events, and the handle of its buckets where it has them."""
        values, _ = self._sockets.receive_handles(peer)
        if values["bucket_bytes"] != self.bucket_bytes:
            raise ConnectionError(f"{self._sockets.name(peer)} has buckets of {values['bucket_bytes']} bytes")
        self._peer_events[peer] = [self._memory.open_event(bytes.fromhex(handle)) for handle in values["events"]]
        bucket: str | None = values["bucket"]
        return bucket

    def _record_and_tell(self, kind: int, slot: int) -> None:
        for peer, size in self._rounds[slot].items():
            self._own_events[peer][slot].record()  # on the current stream, after all that was queued there
            self._sockets.tell(peer, kind, slot, size)

    def _hear_and_wait(self, kind: int, slot: int) -> None:
        sizes = self._rounds[slot]
        self._sockets.hear(list(sizes), kind, slot, list(sizes.values()))
        for peer in sizes:
            self._peer_events[peer][slot].wait()  # the current stream does; the event was recorded before the message


class CudaIpcSender(CudaIpcTransport):
    """The end of a trainer rank, on its `device`.

    Raises:
        ConnectionError: a destination did not come within `timeout_s`.
    """

    def __init__(
        self,
        folder: Path,
        source: int,
        destinations: Sequence[int],
        bucket_bytes: int,
        timeout_s: float,
        device: torch.device,
    ) -> None:
        super().__init__(PeerSockets("engine worker", timeout_s), destinations, bucket_bytes, device)
        self._sockets.accept(socket_path(folder, source), destinations)
        for peer in destinations:
            memory, handle = self._memory.allocate(NUM_SLOTS * bucket_bytes)
            self._buffers[peer] = memory.split(bucket_bytes)
            self._exchange(peer, handle.hex())
        for peer in destinations:
            self._adopt(peer)

    def start(self, slot: int, sizes: Mapping[int, int], direct: Mapping[int, Sequence[torch.Tensor]]) -> None:
        self._rounds[slot] = dict(sizes)
        self._record_and_tell(FILLED, slot)
        self.sent_bytes += sum(sizes.values())

    def wait(self, slot: int) -> None:
        self._hear_and_wait(RELEASED, slot)
        self._rounds[slot] = {}

    def release(self, slot: int) -> None:
        """Nothing: a sender waits."""


class CudaIpcReceiver(CudaIpcTransport):
    """The end of an engine worker, on its `device`, from which the sources' devices can be reached.

    Raises:
        ConnectionError: a source could not be reached within `timeout_s`, or has other buckets.
    """

    def __init__(
        self,
        folder: Path,
        destination: int,
        sources: Sequence[int],
        bucket_bytes: int,
        timeout_s: float,
        device: torch.device,
    ) -> None:
        super().__init__(PeerSockets("trainer rank", timeout_s), sources, bucket_bytes, device)
        for peer in sources:
            self._sockets.connect(socket_path(folder, peer), peer, destination)
        for peer in sources:
            handle = self._adopt(peer)
            assert handle is not None
            self._buffers[peer] = self._memory.open(bytes.fromhex(handle), NUM_SLOTS * bucket_bytes).split(bucket_bytes)
            self._exchange(peer, None)

    def start(self, slot: int, sizes: Mapping[int, int], direct: Mapping[int, Sequence[torch.Tensor]]) -> None:
        self._rounds[slot] = dict(sizes)

    def wait(self, slot: int) -> None:
        self._hear_and_wait(FILLED, slot)
        self.received_bytes += sum(self._rounds[slot].values())

    def release(self, slot: int) -> None:
        self._record_and_tell(RELEASED, slot)


class CudaMemory:
    """Device memory and events that another process can open. cudaIpc takes what cudaMalloc gave, whole.

    torch's own allocator may hand out parts of a block, or pages that can't be shared (expandable segments).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runtime: Any = _load_runtime()
        self._allocated: list[int] = []
        self._opened: list[int] = []

    def allocate(self, size: int) -> tuple[torch.Tensor, bytes]:
        """A uint8 tensor [size] and its handle."""
        pointer, handle = ctypes.c_void_p(), (ctypes.c_char * HANDLE_BYTES)()
        with torch.cuda.device(self.device):
            self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
            assert pointer.value is not None
            self._allocated.append(pointer.value)
            self._call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
        return self._as_tensor(pointer.value, size), bytes(handle)

    def open(self, handle: bytes, size: int) -> torch.Tensor:
        """The memory behind another process's handle."""
        pointer = ctypes.c_void_p()
        lazily_enable_peer_access = ctypes.c_uint(1)
        with torch.cuda.device(self.device):
            by_value = _MemoryHandle.from_buffer_copy(handle)
            self._call("cudaIpcOpenMemHandle", ctypes.byref(pointer), by_value, lazily_enable_peer_access)
        assert pointer.value is not None
        self._opened.append(pointer.value)
        return self._as_tensor(pointer.value, size)

    def make_event(self) -> Any:
        """An event that this process records. Its handle is made while its device is the current one."""
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(interprocess=True)
            event.record()
        return event

    def event_handle(self, event: Any) -> bytes:
        """For `open_event` of another process."""
        return bytes(event.ipc_handle())

    def open_event(self, handle: bytes) -> Any:
        """An event that another process records."""
        return torch.cuda.Event.from_ipc_handle(self.device, handle)

    def close(self) -> None:
        """Wait for what is queued, then give the memory back; more than once does no harm."""
        opened, allocated, self._opened, self._allocated = self._opened, self._allocated, [], []
        if not opened and not allocated:
            return
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            for pointer in opened:
                self._call("cudaIpcCloseMemHandle", ctypes.c_void_p(pointer))
            for pointer in allocated:
                self._call("cudaFree", ctypes.c_void_p(pointer))

    def _as_tensor(self, pointer: int, size: int) -> torch.Tensor:
        interface = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3}
        holder = type("DeviceMemory", (), {"__cuda_array_interface__": interface})()
        return torch.as_tensor(holder, device=self.device)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._runtime, name)(*arguments)
        if status:
            if name != "cudaIpcOpenMemHandle":
                raise RuntimeError(f"{name} failed with CUDA error {status}")
            raise ConnectionError(f"{name} failed with CUDA error {status}: can the processes see the same devices?")


class _MemoryHandle(ctypes.Structure):
    """cudaIpcMemHandle_t, which is passed by value."""

    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


def _load_runtime() -> Any:
    """The CUDA runtime that torch has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if "libcudart" in path:
            return ctypes.CDLL(path)
    raise ConnectionError("sync.transport=cuda_ipc: torch has loaded no CUDA runtime; use shared_memory on a CPU")
