"""Both ends of shared memory in one process; tests/parity/test_weight_sync.py has real ones."""

from __future__ import annotations

import os
import threading

import pytest

from fipo_megatron.reshard.transport.shared_memory import CACHED_BUCKET_BYTES, SharedMemoryReceiver, SharedMemorySender


def make_ends(folder, sender_bytes=4096, receiver_bytes=4096):
    ends = []

    def connect():
        try:
            ends.append(SharedMemoryReceiver(folder, 0, [7], receiver_bytes, 5.0))
        except ConnectionError as error:
            ends.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    sender = SharedMemorySender(folder, 7, [0], sender_bytes, 5.0)
    thread.join()
    return sender, ends[0]


def test_both_see_the_same_memory(tmp_path):
    open_before = len(os.listdir("/proc/self/fd"))
    sender, receiver = make_ends(tmp_path)
    for slot in (0, 1):
        sender.wait(slot)
        sender.buffers(0)[slot][:3].fill_(5 + slot)
        receiver.start(slot, {7: 3}, {})
        sender.start(slot, {0: 3}, {})
        receiver.wait(slot)
        assert receiver.buffers(7)[slot].unique().tolist() == [0, 5 + slot]
        receiver.release(slot)
        sender.wait(slot)
    assert (sender.sent_bytes, receiver.received_bytes) == (6, 6)
    for end in (sender, receiver):
        end.close()
        end.close()
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert list(tmp_path.iterdir()) == []


def test_buckets_stay_in_the_caches(tmp_path):
    sender, receiver = make_ends(tmp_path, 1 << 40, 1 << 40)
    assert sender.bucket_bytes == receiver.bucket_bytes == len(receiver.buffers(7)[1]) == CACHED_BUCKET_BYTES
    sender.close()
    receiver.close()


def test_ends_with_other_buckets_are_refused(tmp_path):
    sender, error = make_ends(tmp_path, 4096, 8192)
    with pytest.raises(ConnectionError, match="trainer rank 7 has buckets of 4096 bytes"):
        raise error
    sender.close()
