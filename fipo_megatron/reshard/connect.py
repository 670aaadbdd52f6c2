"""The ends of a session: what a trainer rank pushes through, and what an engine's worker receives through."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from fipo_megatron.model.weight_map.entry import open_safetensors
from fipo_megatron.reshard.execute import WeightReceiver, WeightSender
from fipo_megatron.reshard.plan import ReshardPlan
from fipo_megatron.reshard.session import WeightSession
from fipo_megatron.reshard.transport.base import Transport, bucket_size
from fipo_megatron.reshard.transport.broadcast import SENDER
from fipo_megatron.reshard.transport.collective import CollectiveTransport
from fipo_megatron.reshard.transport.cuda_ipc import CudaIpcReceiver, CudaIpcSender
from fipo_megatron.reshard.transport.disk import (
    ChangesReceiver,
    ChangesSender,
    FolderReceiver,
    FolderSender,
    NamedTensors,
)
from fipo_megatron.reshard.transport.shared_memory import SharedMemoryReceiver, SharedMemorySender
from fipo_megatron.reshard.whole_tensors import WholeTensorsOut, check_updates_of_ranks, connect_broadcast

if TYPE_CHECKING:  # it imports Megatron-Core, which an engine's worker has no use for
    from fipo_megatron.model.weights import PolicyWeights


class WeightsOut(Protocol):
    """A trainer rank's end."""

    def send(self, version: int, num_updates: int) -> int:
        """Bytes sent of the live parameters, which are `version`, after `num_updates` updates of this rank.

        Raises:
            ConnectionError: an engine is gone.
        """
        ...

    def close(self) -> None:
        """Give connections and memory up."""
        ...


class WeightsIn(Protocol):
    """An engine worker's end."""

    def receive(self, version: int) -> None:
        """Fill the engine's parameters. Raises ConnectionError, StaleWeightsError."""
        ...

    def verify(self) -> None:
        """Compare the engine's parameters with the trainer's. Raises WeightMismatchError."""
        ...

    def close(self) -> None:
        """Give connections and memory up."""
        ...


class _Sending(Protocol):
    """A sender of reshard/transport/disk.py."""

    sent_bytes: int

    def send(self, version: int, num_updates: int) -> None: ...

    def close(self) -> None: ...


class ShardsOut:
    """Shard to shard, by the plan."""

    def __init__(self, sender: WeightSender) -> None:
        self._sender = sender

    def send(self, version: int, num_updates: int) -> int:
        """See `WeightsOut`; counted at the transport, without the trailers."""
        transport = self._sender.transport
        before = transport.sent_bytes
        self._sender.send(version, num_updates)
        return transport.sent_bytes - before - self._sender.trailer_bytes

    def close(self) -> None:
        """See `WeightsOut`."""
        self._sender.transport.close()


class FilesOut:
    """Through files; what gathers is collective over the trainer's ranks."""

    def __init__(self, sender: _Sending, gathers: bool) -> None:
        self._sender, self._gathers = sender, gathers

    def send(self, version: int, num_updates: int) -> int:
        """See `WeightsOut`. StaleWeightsError where ranks that gather made different numbers of updates."""
        if self._gathers:
            check_updates_of_ranks(num_updates, version)
        before = self._sender.sent_bytes
        self._sender.send(version, num_updates)
        return self._sender.sent_bytes - before

    def close(self) -> None:
        """See `WeightsOut`."""
        self._sender.close()


def connect_sender(
    session: WeightSession,
    weights: PolicyWeights,
    source: int,
    listener: socket.socket | None,
    device: torch.device,
    write_folder: Callable[[NamedTensors, Path], None],
) -> WeightsOut:
    """The end of trainer rank `source`; `listener` is rank 0's socket on the session's port, `write_folder` writes a
    Hugging Face folder of whole tensors.

    Blocks until the engines' workers that it sends to have come.

    Raises:
        ConnectionError: one did not.
    """
    if session.transport == "broadcast":
        return WholeTensorsOut(weights, connect_broadcast(session, SENDER, listener) if source == 0 else None, session)
    plan, folder = session.make_plan(), Path(session.folder)
    if session.transport == "disk":
        whole = FolderSender(plan, source, folder, weights.gather, write_folder, session.verify)
        return FilesOut(whole, gathers=True)
    if session.transport == "disk_delta":
        return FilesOut(ChangesSender(plan, source, weights.parameters, folder, session.verify), gathers=False)
    destinations = sorted(plan.sends(source))
    size, timeout_s = bucket_size(session.bucket_bytes, plan.max_peers), session.timeout_s
    transport: Transport
    if session.transport == "collective":
        transport = _collective(session, plan, source, True, destinations, device, listener)
    elif session.transport == "cuda_ipc":
        transport = CudaIpcSender(folder, source, destinations, size, timeout_s, device)
    else:
        transport = SharedMemorySender(folder, source, destinations, size, timeout_s)
    return ShardsOut(WeightSender(plan, source, weights.parameters, transport, session.verify))


def connect_receiver(
    session: WeightSession, plan: ReshardPlan, destination: int, views: Mapping[str, torch.Tensor]
) -> WeightsIn:
    """The end of engine worker `destination`, which fills `views`, of Hugging Face names.

    Raises:
        ConnectionError: a trainer rank could not be reached.
    """
    folder, timeout_s, verify = Path(session.folder), session.timeout_s, session.verify
    if session.transport == "disk":
        return FolderReceiver(plan, destination, views, folder, open_safetensors, timeout_s, verify)
    if session.transport == "disk_delta":
        return ChangesReceiver(plan, destination, views, folder, timeout_s, verify)
    sources = sorted(plan.receives(destination))
    device = next(iter(views.values())).device
    size = bucket_size(session.bucket_bytes, plan.max_peers)
    transport: Transport
    if session.transport == "collective":
        transport = _collective(session, plan, destination, False, sources, device, None)
    elif session.transport == "cuda_ipc":
        transport = CudaIpcReceiver(folder, destination, sources, size, timeout_s, device)
    else:
        transport = SharedMemoryReceiver(folder, destination, sources, size, timeout_s)
    return WeightReceiver(plan, destination, views, transport, verify)


def _collective(
    session: WeightSession,
    plan: ReshardPlan,
    number: int,
    sends: bool,
    peers: list[int],
    device: torch.device,
    listener: socket.socket | None,
) -> CollectiveTransport:
    return CollectiveTransport(
        session.address,
        session.port,
        number=number,
        sends=sends,
        peers=peers,
        num_sources=session.trainer.world_size,
        num_destinations=session.engine.num_workers,
        bucket_bytes=bucket_size(session.bucket_bytes, plan.max_peers),
        timeout_s=session.timeout_s,
        device=device,
        listener=listener,
    )
