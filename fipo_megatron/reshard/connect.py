"""The ends of a session: what a trainer rank pushes through, and what an engine's worker receives through."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from fipo_megatron.model.weights import PolicyWeights
from fipo_megatron.reshard.execute import WeightReceiver, WeightSender
from fipo_megatron.reshard.plan import ReshardPlan
from fipo_megatron.reshard.session import WeightSession
from fipo_megatron.reshard.transport.base import Transport, bucket_size
from fipo_megatron.reshard.transport.broadcast import SENDER
from fipo_megatron.reshard.transport.collective import CollectiveTransport
from fipo_megatron.reshard.transport.shared_memory import SharedMemoryReceiver, SharedMemorySender
from fipo_megatron.reshard.whole_tensors import WholeTensorsOut, connect_broadcast


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


def connect_sender(
    session: WeightSession, weights: PolicyWeights, source: int, listener: socket.socket | None, device: torch.device
) -> WeightsOut:
    """The end of trainer rank `source`; `listener` is rank 0's socket on the session's port.

    Blocks until the engines' workers that it sends to have come.

    Raises:
        ConnectionError: one did not.
    """
    if session.transport == "broadcast":
        return WholeTensorsOut(weights, connect_broadcast(session, SENDER, listener) if source == 0 else None, session)
    plan = session.make_plan()
    destinations = sorted(plan.sends(source))
    transport: Transport
    if session.transport == "collective":
        transport = _collective(session, plan, source, True, destinations, device, listener)
    else:
        size = bucket_size(session.bucket_bytes, plan.max_peers)
        transport = SharedMemorySender(Path(session.folder), source, destinations, size, session.timeout_s)
    return ShardsOut(WeightSender(plan, source, weights.parameters, transport, session.verify))


def connect_receiver(
    session: WeightSession, plan: ReshardPlan, destination: int, views: Mapping[str, torch.Tensor]
) -> WeightsIn:
    """The end of engine worker `destination`, which fills `views`, of Hugging Face names.

    Raises:
        ConnectionError: a trainer rank could not be reached.
    """
    sources = sorted(plan.receives(destination))
    device = next(iter(views.values())).device
    transport: Transport
    if session.transport == "collective":
        transport = _collective(session, plan, destination, False, sources, device, None)
    else:
        size = bucket_size(session.bucket_bytes, plan.max_peers)
        transport = SharedMemoryReceiver(Path(session.folder), destination, sources, size, session.timeout_s)
    return WeightReceiver(plan, destination, views, transport, session.verify)


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
