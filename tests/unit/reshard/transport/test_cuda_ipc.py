"""The order of events and messages of CUDA IPC, with a fake in place of device memory: no GPU is asked.

What the fake can't show: the calls of the CUDA runtime themselves, and that a device keeps to its events.
"""

from __future__ import annotations

import threading

import pytest
import torch

from fipo_megatron.reshard.transport import cuda_ipc
from fipo_megatron.reshard.transport.cuda_ipc import CudaIpcReceiver, CudaIpcSender


class FakeDevice:
    """Memory and events of both ends, by handle; `log` is the order in which events were recorded and waited for."""

    def __init__(self) -> None:
        self.memory: dict[bytes, torch.Tensor] = {}
        self.events: dict[bytes, FakeEvent] = {}
        self.log: list[tuple[str, bytes]] = []
        self.closed = 0


class FakeEvent:
    def __init__(self, device: FakeDevice, handle: bytes) -> None:
        self.device, self.handle = device, handle

    def record(self) -> None:
        self.device.log.append(("record", self.handle))

    def wait(self) -> None:
        assert ("record", self.handle) in self.device.log
        self.device.log.append(("wait", self.handle))


class FakeHandleExchange:
    """In place of CudaMemory."""

    shared = FakeDevice()

    def __init__(self, device) -> None:
        pass

    def allocate(self, size):
        handle = len(self.shared.memory).to_bytes(64)
        self.shared.memory[handle] = torch.zeros(size, dtype=torch.uint8)
        return self.shared.memory[handle], handle

    def open(self, handle, size):
        assert len(self.shared.memory[handle]) == size
        return self.shared.memory[handle]

    def make_event(self):
        handle = len(self.shared.events).to_bytes(64)
        self.shared.events[handle] = FakeEvent(self.shared, handle)
        return self.shared.events[handle]

    def event_handle(self, event):
        return event.handle

    def open_event(self, handle):
        return self.shared.events[handle]

    def close(self):
        self.shared.closed += 1


def test_no_bucket_is_written_before_its_reader_has_copied(tmp_path, monkeypatch):
    shared = FakeDevice()
    monkeypatch.setattr(FakeHandleExchange, "shared", shared)
    monkeypatch.setattr(cuda_ipc, "CudaMemory", FakeHandleExchange)
    device = torch.device("cpu")
    ends = []
    thread = threading.Thread(target=lambda: ends.append(CudaIpcReceiver(tmp_path, 3, [0], 64, 5.0, device)))
    thread.start()
    sender = CudaIpcSender(tmp_path, 0, [3], 64, 5.0, device)
    thread.join()
    (receiver,) = ends
    shared.log.clear()
    for number in range(4):
        slot = number % 2
        sender.wait(slot)
        if number > 1:  # the event of the reader's copy of two rounds before was waited for
            assert [what for what, _ in shared.log[-2:]] == ["record", "wait"] or shared.log[-1][0] == "wait"
        sender.buffers(3)[slot].fill_(number)
        receiver.start(slot, {0: 10}, {})
        sender.start(slot, {3: 10}, {})
        receiver.wait(slot)
        assert receiver.buffers(0)[slot].unique().tolist() == [number]
        receiver.release(slot)
    filled_0, read_0 = shared.log[0][1], shared.log[2][1]
    assert [what for what in shared.log if what[1] in (filled_0, read_0)] == [
        ("record", filled_0),
        ("wait", filled_0),
        ("record", read_0),
        ("wait", read_0),
        ("record", filled_0),
        ("wait", filled_0),
        ("record", read_0),
    ]
    assert (sender.sent_bytes, receiver.received_bytes) == (40, 40)
    receiver.close()
    with pytest.raises(ConnectionError, match="engine worker 3 died or gave up"):
        sender.wait(0) or sender.start(0, {3: 1}, {}) or sender.wait(0)
    sender.close()
    assert shared.closed == 2
    assert list(tmp_path.iterdir()) == []


def test_without_cuda_it_is_said(monkeypatch, tmp_path):
    (tmp_path / "maps").write_text("")
    with pytest.raises(ConnectionError, match="sync.transport=cuda_ipc: torch has loaded no CUDA runtime"):
        cuda_ipc.CudaMemory(torch.device("cuda"))
