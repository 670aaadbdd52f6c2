"""Weights by broadcast: a process group of its own between the trainer's rank 0 and the engine's workers."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fipo_megatron.parallel.groups import make_store

SENDER = 0  # the trainer's rank in the group; engine workers follow from 1


@dataclass(frozen=True)
class TensorMeta:
    """One tensor on the wire, under its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a torch dtype's name, e.g. "float32"


class BroadcastGroup:
    """One end of the group. A broadcast that a peer leaves waiting longer than `timeout_s` raises."""

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        size: int,
        timeout_s: float,
        listener: socket.socket | None = None,
    ) -> None:
        self._store = make_store(address, port, size, timeout_s, listener)
        self._group: Any = dist.ProcessGroupGloo(
            dist.PrefixStore("weights", self._store), rank, size, timedelta(seconds=timeout_s)
        )

    def send(self, tensor: torch.Tensor) -> None:
        """Broadcast one tensor; the sender's side."""
        self._broadcast(tensor.contiguous())

    def receive(self, metas: Sequence[TensorMeta]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that the sender sends, in the order of `metas`; an engine worker's side."""
        for meta in metas:
            tensor = torch.empty(meta.shape, dtype=getattr(torch, meta.dtype))
            self._broadcast(tensor)
            yield meta.name, tensor

    def _broadcast(self, tensor: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        self._group.broadcast([tensor], options).wait()
