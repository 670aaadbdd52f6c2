"""Unix sockets between a trainer rank and the engine workers on its machine: who may write or read a bucket now.

A message is (kind, slot, size). A peer that dies closes its socket, which every wait notices at once, whomever it waits
for. One that says goodbye is missed only by who waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELLO, FILLED, RELEASED, GOODBYE = range(4)
_MESSAGE = struct.Struct("<BBQ")
_MAX_MESSAGE = 1 << 16
_RETRY_S = 0.02


class PeerSockets:
    """The connections of one end, by peer.

    Raises:
        ConnectionError: (all methods) a peer died, or said nothing for `timeout_s`; its name is in the message.
    """

    def __init__(self, peer_kind: str, timeout_s: float) -> None:
        self.peer_kind, self.timeout_s = peer_kind, timeout_s
        self._sockets: dict[int, socket.socket] = {}
        self._inbox: dict[int, deque[tuple[int, int, int]]] = {}
        self._poll = select.poll()
        self._peer_of: dict[int, int] = {}  # by file descriptor
        self._gone: set[int] = set()  # who said goodbye

    def name(self, peer: int) -> str:
        """E.g. "engine worker 3"."""
        return f"{self.peer_kind} {peer}"

    def accept(self, path: Path, peers: Sequence[int]) -> None:
        """Listen on `path` until every peer has connected and said which it is. Nothing is left at `path`."""
        deadline = time.monotonic() + self.timeout_s
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            path.unlink(missing_ok=True)  # of a run that was killed
            listener.bind(_short(folder, path.name))
            listener.listen(len(peers))
            while missing := set(peers) - self._sockets.keys():
                listener.settimeout(max(deadline - time.monotonic(), 1e-3))
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    names = ", ".join(self.name(peer) for peer in sorted(missing))
                    raise ConnectionError(f"{names} did not connect within {self.timeout_s:g} s") from None
                sock.settimeout(max(deadline - time.monotonic(), 1e-3))
                try:
                    message = sock.recv(_MESSAGE.size)
                except OSError:  # it died, or was stopped, before it said which it is
                    message = b""
                sock.settimeout(self.timeout_s)
                if len(message) != _MESSAGE.size or (peer := _MESSAGE.unpack(message)[2]) not in missing:
                    sock.close()
                    continue
                self._add(peer, sock)
        except BaseException:
            self.close()
            raise
        finally:
            listener.close()
            path.unlink(missing_ok=True)
            os.close(folder)

    def connect(self, path: Path, peer: int, own: int) -> None:
        """Connect to the peer that listens, or is about to listen, on `path`, as number `own`."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(self.timeout_s)
            try:
                folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
                try:
                    sock.connect(_short(folder, path.name))
                finally:
                    os.close(folder)
                sock.send(_MESSAGE.pack(HELLO, 0, own))
            except OSError as error:
                sock.close()
                if time.monotonic() > deadline:
                    reason = f"{self.name(peer)} could not be reached within {self.timeout_s:g} s ({error.strerror})"
                    raise ConnectionError(reason) from error
                time.sleep(_RETRY_S)
                continue
            self._add(peer, sock)
            return

    def send_handles(self, peer: int, values: dict[str, Any], file_descriptors: Sequence[int] = ()) -> None:
        """Hand over plain values, and open files."""
        try:
            socket.send_fds(self._sockets[peer], [json.dumps(values).encode()], list(file_descriptors))
        except OSError as error:
            raise self._lost(peer, error) from error

    def receive_handles(self, peer: int) -> tuple[dict[str, Any], list[int]]:
        """What the peer's `send_handles` hands over."""
        try:
            message, file_descriptors, _, _ = socket.recv_fds(self._sockets[peer], _MAX_MESSAGE, 4)
        except OSError as error:
            raise self._lost(peer, error) from error
        if not message:
            raise self._lost(peer, None)
        return json.loads(message), list(file_descriptors)

    def tell(self, peer: int, kind: int, slot: int, size: int) -> None:
        """Send a message."""
        try:
            self._sockets[peer].send(_MESSAGE.pack(kind, slot, size))
        except OSError as error:
            raise self._lost(peer, error) from error

    def hear(self, peers: Sequence[int], kind: int, slot: int, sizes: Sequence[int]) -> None:
        """Wait for the next message of each peer, which must be this one."""
        deadline = time.monotonic() + self.timeout_s
        for peer, size in zip(peers, sizes, strict=True):
            while not self._inbox[peer]:
                if peer in self._gone:
                    raise self._lost(peer, None)
                self._read(peer, deadline)
            message = self._inbox[peer].popleft()
            if message != (kind, slot, size):
                raise ConnectionError(
                    f"{self.name(peer)} sent {message}, not {(kind, slot, size)}: it follows another plan"
                )

    def close(self) -> None:
        """Close all connections."""
        for sock in self._sockets.values():
            with contextlib.suppress(OSError):
                sock.setblocking(False)
                sock.send(_MESSAGE.pack(GOODBYE, 0, 0))
            sock.close()
        self._sockets, self._peer_of, self._poll = {}, {}, select.poll()

    def _add(self, peer: int, sock: socket.socket) -> None:
        self._sockets[peer], self._inbox[peer] = sock, deque()
        self._peer_of[sock.fileno()] = peer
        self._poll.register(sock, select.POLLIN)

    def _read(self, awaited: int, deadline: float) -> None:
        """Read whatever any peer sends next: the death of one that is not awaited yet counts, too."""
        ready = self._poll.poll(max(1, int(1e3 * (deadline - time.monotonic()))))
        if not ready and time.monotonic() >= deadline:
            raise ConnectionError(f"{self.name(awaited)} said nothing for {self.timeout_s:g} s")
        for descriptor, _ in ready:
            peer = self._peer_of[descriptor]
            try:
                message = self._sockets[peer].recv(_MESSAGE.size)
            except OSError as error:
                raise self._lost(peer, error) from error
            if not message:
                raise self._lost(peer, None)
            if message[0] == GOODBYE:
                self._gone.add(peer)
                self._poll.unregister(descriptor)
            else:
                self._inbox[peer].append(_MESSAGE.unpack(message))

    def _lost(self, peer: int, error: OSError | None) -> ConnectionError:
        reason = "it closed the connection" if error is None else error.strerror or type(error).__name__
        return ConnectionError(f"{self.name(peer)} died or gave up: {reason}")


def _short(folder: int, name: str) -> str:
    """A path through an open folder: that of a socket may have 107 bytes only."""
    return f"/proc/self/fd/{folder}/{name}"
