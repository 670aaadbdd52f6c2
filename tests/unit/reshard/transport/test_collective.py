"""Rendezvous that fails; tests/parity/test_weight_sync.py has groups of real processes."""

from __future__ import annotations

import pytest
import torch

from fipo_megatron.parallel.groups import listening_socket
from fipo_megatron.reshard.transport.collective import CollectiveTransport


def test_processes_that_do_not_come(monkeypatch):
    listener = listening_socket("127.0.0.1")
    with pytest.raises(ConnectionError, match="a process of the weight group died or stalled"):
        CollectiveTransport(
            "127.0.0.1",
            listener.getsockname()[1],
            number=0,
            sends=True,
            peers=[0],
            num_sources=1,
            num_destinations=1,
            bucket_bytes=64,
            timeout_s=0.5,
            device=torch.device("cpu"),
            listener=listener,
        )
