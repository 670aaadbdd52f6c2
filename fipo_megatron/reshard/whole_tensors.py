"""Whole tensors, gathered on the trainer's rank 0 and broadcast to every engine worker, for the engine's own loader.

The slow twin of the plan's shards, and the way for engines that store weights in a layout of their own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import hf_tensor_shape
from fipo_megatron.model.weight_map.families import make_entries
from fipo_megatron.reshard.checksum import checksum
from fipo_megatron.reshard.execute import StaleWeightsError, WeightMismatchError, check_updates
from fipo_megatron.reshard.session import WeightSession
from fipo_megatron.reshard.transport.broadcast import BroadcastGroup, TensorMeta

if TYPE_CHECKING:  # it imports Megatron-Core, which an engine's worker has no use for
    from fipo_megatron.model.weights import PolicyWeights


def whole_tensors(shape: ModelShape, dtype: torch.dtype) -> list[TensorMeta]:
    """Every tensor of a model, in the order in which `PolicyWeights.gather` yields them."""
    name = str(dtype).removeprefix("torch.")
    return [
        TensorMeta(hf_name, hf_tensor_shape(hf_name, shape), name)
        for entry in make_entries(shape)
        for hf_name in entry.hf_names
    ]


def connect_broadcast(session: WeightSession, rank: int, listener: socket.socket | None = None) -> BroadcastGroup:
    """The group of trainer rank 0 and all engine workers, whose ranks are 1 + their number.

    Raises:
        ConnectionError: not all came.
    """
    size = 1 + session.engine.num_workers
    # Half: the trainer's other ranks wait for rank 0, in groups of their own with the whole of it.
    timeout_s = session.timeout_s / 2
    try:
        return BroadcastGroup(session.address, session.port, rank, size, timeout_s, listener)
    except RuntimeError as error:
        raise ConnectionError(f"not all of trainer and engines joined the weight group: {error}") from error


def check_updates_of_ranks(num_updates: int, version: int) -> None:
    """StaleWeightsError where a rank of the trainer made fewer updates than others. Collective over the trainer."""
    updates: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(updates, num_updates)
    check_updates(dict(enumerate(updates)), version)


class WholeTensorsOut:
    """A trainer rank's end. Its calls are collective over the trainer's ranks; rank 0 alone has a group."""

    def __init__(self, weights: PolicyWeights, group: BroadcastGroup | None, session: WeightSession) -> None:
        self._weights, self._group, self._session = weights, group, session

    def send(self, version: int, num_updates: int) -> int:
        """Bytes that this rank broadcasts, times the engines' workers. After the tensors comes a trailer: version, and
        a checksum of each.

        Raises:
            ConnectionError: (rank 0) the engine is gone; the trainer's own ranks have finished their part and go on.
            StaleWeightsError: ranks made different numbers of updates.
        """
        try:
            check_updates_of_ranks(num_updates, version)
        except StaleWeightsError:
            self.close()  # the engines wait for a first tensor
            raise
        failure: RuntimeError | None = None
        trailer, num_bytes = [version], 0
        for name, tensor in self._weights.gather():  # to the end, for the other ranks' sake
            if failure is None:
                tensor = tensor.cpu()  # as it arrives, and so that both ends hash alike
                try:
                    self._broadcast(tensor)
                    num_bytes += tensor.nbytes * self._session.engine.num_workers
                except RuntimeError as error:
                    failure = RuntimeError(f"sending {name} to the engine failed: {error}")
                if self._session.verify:
                    trailer.append(checksum(tensor))
        if failure is None and self._group is not None:
            try:
                self._broadcast(_as_int64(trailer))
            except RuntimeError as error:
                failure = error
        if failure is not None:
            raise ConnectionError(str(failure))
        return num_bytes

    def close(self) -> None:
        """Leave the group."""
        self._group = None

    def _broadcast(self, tensor: torch.Tensor) -> None:
        assert self._group is not None, "rank 0 gathers, and has the group"
        self._group.send(tensor)


class WholeTensorsIn:
    """An engine worker's end."""

    def __init__(self, session: WeightSession, group: BroadcastGroup, dtype: torch.dtype) -> None:
        self._group, self._verify = group, session.verify
        self._metas = whole_tensors(session.shape, dtype)
        self._found: list[int] = []
        self._trailer: list[int] = []

    def tensors(self, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """`(Hugging Face name, tensor)` as they arrive.

        Raises:
            StaleWeightsError: (at the end) they are of another version.
        """
        self._found = []
        for name, tensor in self._group.receive(self._metas):
            if self._verify:
                self._found.append(checksum(tensor))
            yield name, tensor
        length = 1 + len(self._found)
        ((_, trailer),) = self._group.receive([TensorMeta("trailer", (length,), "int64")])
        self._trailer = trailer.tolist()
        if self._trailer[0] != version:
            raise StaleWeightsError(f"version {version} was to come, trainer rank 0 sent {self._trailer[0]}")

    def close(self) -> None:
        """Leave the group."""
        del self._group

    def verify(self) -> None:
        """WeightMismatchError, which names the tensors, if what arrived is not what was sent."""
        expected = self._trailer[1:]
        wrong = [
            meta.name
            for meta, found, sent in zip(self._metas, _as_int64(self._found).tolist(), expected, strict=True)
            if found != sent
        ]
        if wrong:
            raise WeightMismatchError(f"{len(wrong)} tensors are not what trainer rank 0 sent: {', '.join(wrong[:5])}")


def _as_int64(values: list[int]) -> torch.Tensor:
    """Checksums of 64 bits as signed numbers."""
    return torch.tensor([value - (1 << 64) if value >= 1 << 63 else value for value in values], dtype=torch.int64)
