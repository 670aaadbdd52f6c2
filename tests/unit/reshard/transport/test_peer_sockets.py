"""Messages between two ends in one process."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from fipo_megatron.reshard.transport.peer_sockets import FILLED, RELEASED, PeerSockets


def make_pair(path, numbers=(4, 5), timeout_s=5.0):
    """One that listens, and those that connect to it as `numbers`."""
    listener = PeerSockets("engine worker", timeout_s)
    connecting = [PeerSockets("trainer rank", timeout_s) for _ in numbers]
    threads = [
        threading.Thread(target=end.connect, args=(path, 0, number))
        for end, number in zip(connecting, numbers, strict=True)
    ]
    for thread in threads:
        thread.start()
    listener.accept(path, numbers)
    for thread in threads:
        thread.join()
    return listener, connecting


def test_messages_and_handles(tmp_path):
    path = tmp_path / ("long" * 40) / "x.sock"  # longer than a socket's path may be
    path.parent.mkdir()
    listener, (four, five) = make_pair(path)
    assert list(path.parent.iterdir()) == []
    five.tell(0, FILLED, 1, 77)
    four.tell(0, FILLED, 1, 1 << 40)
    listener.hear([4, 5], FILLED, 1, [1 << 40, 77])
    memory = os.memfd_create("test")
    os.write(memory, b"content")
    listener.send_handles(4, {"a": 1}, [memory])
    os.close(memory)
    values, (received,) = four.receive_handles(0)
    assert (values, os.pread(received, 7, 0)) == ({"a": 1}, b"content")
    os.close(received)
    for end in (listener, four, five):
        end.close()
        end.close()


def test_a_peer_that_left_is_missed_by_who_waits_for_it(tmp_path):
    listener, (four, five) = make_pair(tmp_path / "x.sock")
    four.tell(0, RELEASED, 0, 3)
    four.close()
    five.tell(0, RELEASED, 0, 3)
    listener.hear([4, 5], RELEASED, 0, [3, 3])
    with pytest.raises(ConnectionError, match="engine worker 4 died or gave up"):
        listener.hear([4], RELEASED, 1, [3])
    five.close()
    listener.close()


def test_a_peer_that_dies_is_named_at_once_whoever_is_awaited(tmp_path):
    listener, (four, five) = make_pair(tmp_path / "x.sock")
    five._sockets[0].close()  # as a killed process's is: without goodbye
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="engine worker 5 died or gave up: it closed the connection"):
        listener.hear([4], FILLED, 0, [3])
    assert time.monotonic() - start < 1
    with pytest.raises(ConnectionError, match="engine worker 5 died"):
        listener.tell(5, FILLED, 0, 3)
    four.close()
    listener.close()


def test_silence_and_strangers(tmp_path):
    listener, (four,) = make_pair(tmp_path / "x.sock", (4,), timeout_s=0.2)
    with pytest.raises(ConnectionError, match="engine worker 4 said nothing for 0.2 s"):
        listener.hear([4], FILLED, 0, [3])
    four.tell(0, FILLED, 0, 4)
    with pytest.raises(ConnectionError, match="engine worker 4 sent .* it follows another plan"):
        listener.hear([4], FILLED, 0, [3])
    with pytest.raises(ConnectionError, match="engine worker 1, engine worker 2 did not connect within 0.1 s"):
        PeerSockets("engine worker", 0.1).accept(tmp_path / "y.sock", (2, 1))
    with pytest.raises(ConnectionError, match="trainer rank 3 could not be reached within 0.1 s"):
        PeerSockets("trainer rank", 0.1).connect(tmp_path / "y.sock", 3, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_socket_of_a_killed_run_is_no_hindrance(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as old:
        old.bind(str(tmp_path / "x.sock"))
    listener, (four,) = make_pair(tmp_path / "x.sock", (4,))
    four.close()
    listener.close()
