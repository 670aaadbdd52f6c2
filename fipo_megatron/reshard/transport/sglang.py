"""The sender's end of SGLang's own ways to take whole tensors: a process group that it makes, and shared memory.

For servers that don't have this package's loader (reshard/sglang_worker.py), which takes shards.
"""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from fipo_megatron.parallel.groups import make_store

SENDER = 0  # the trainer's rank in the group; SGLang's workers follow from 1


class SglangBroadcastGroup:
    """Rank 0 of the group that `init_weights_update_group` of SGLang 0.5.23 makes under a name.

    A broadcast that a peer leaves waiting longer than `timeout_s` raises.
    """

    def __init__(
        self, address: str, listener: socket.socket, size: int, timeout_s: float, name: str, device: torch.device
    ) -> None:
        port = int(listener.getsockname()[1])
        self._store = make_store(address, port, size, timeout_s, listener)
        store = meeting_place(self._store, name, device)
        timeout = timedelta(seconds=timeout_s)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group: Any = dist.ProcessGroupNCCL(store, SENDER, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, SENDER, size, timeout)

    def send(self, tensor: torch.Tensor) -> None:
        """Broadcast one tensor."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        self._group.broadcast([tensor.detach().contiguous()], options).wait()


def meeting_place(store: dist.Store, name: str, device: torch.device) -> dist.Store:
    """Where in a store the group of a name meets: SGLang puts the name before it, torch the name and the device."""
    for prefix in (name, f"{name}/", f"{device.type}/"):
        store = dist.PrefixStore(prefix, store)
    return store


def share_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Names and handles of tensors in shared memory, as `update_weights_from_tensor` reads them: pickled, in base64.

    Any process of this user on this machine can map them while the tensors live; those on a CPU are moved there. Each
    worker has to be given one of its own. The tensors must be contiguous.
    """
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    strategy = torch.multiprocessing.get_sharing_strategy()
    # Handles of files need no connection to this process, whose secret another's child doesn't know.
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump([(name, tensor.detach()) for name, tensor in tensors.items()])
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    return base64.b64encode(buffer.getvalue()).decode()
