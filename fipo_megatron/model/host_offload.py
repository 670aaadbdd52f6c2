"""Parameters, gradients and optimizer state in host memory while no phase needs them: an engine can have the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

Part = Literal["parameters", "gradients", "optimizer"]


class HostOffload:
    """Moves whole storages away and back, and never a tensor: every view of one, and all who share it, stay valid.

    Megatron's own functions give the optimizer new tensors, which float32 parameters would then no longer share. Host
    memory is pinned and kept, so that after the first time none is allocated. Gradients are freed, not copied.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._chunks = chunks
        self._optimizer = optimizer
        self._host: dict[int, torch.Tensor] = {}  # by the storage's own address
        self._away: dict[Part, list[tuple[torch.UntypedStorage, int]]] = {}  # and its bytes

    def offload(self) -> None:
        """Move what is on the device; what has moved already stays where it is."""
        taken: set[int] = set()
        tensors_of: dict[Part, Iterator[torch.Tensor]] = {
            "parameters": _parameters(self._chunks),
            "gradients": _gradients(self._chunks),
            "optimizer": _optimizer_tensors(self._optimizer),
        }
        for part, tensors in tensors_of.items():
            storages = _distinct_storages(tensors, taken)
            if part in self._away:
                continue
            for storage in storages:
                if part != "gradients":
                    self._host_copy(storage).copy_(_bytes_of(storage), non_blocking=True)
            self._away[part] = [(storage, storage.nbytes()) for storage in storages]
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        for storage, _ in chain.from_iterable(self._away.values()):
            storage.resize_(0)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def reload(self, *parts: Part) -> None:
        """Bring back these parts as they were, gradients as zeros; what is on the device stays as it is."""
        for part in parts:
            for storage, num_bytes in self._away.pop(part, []):
                storage.resize_(num_bytes)
                if part == "gradients":
                    _bytes_of(storage).zero_()
                else:
                    _bytes_of(storage).copy_(self._host[storage._cdata], non_blocking=True)

    def _host_copy(self, storage: torch.UntypedStorage) -> torch.Tensor:
        copy = self._host.get(storage._cdata)
        if copy is None or len(copy) != storage.nbytes():
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            self._host[storage._cdata] = copy
        return copy


def _parameters(chunks: Sequence[DistributedDataParallel]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        yield from (parameter.data for parameter in chunk.parameters())


def _gradients(chunks: Sequence[DistributedDataParallel]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        yield from (buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))


def _optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Moments, and the float32 copies of parameters of another type."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if each.is_stub_optimizer:  # of a rank without parameters of its kind
            continue
        yield from (parameter.data for group in each.optimizer.param_groups for parameter in group["params"])
        for state in each.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())


def _distinct_storages(tensors: Iterable[torch.Tensor], taken: set[int]) -> list[torch.UntypedStorage]:
    """The storages of the tensors but for those in `taken`, to which they are added."""
    storages = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in taken:
            taken.add(storage._cdata)
            storages.append(storage)
    return storages


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
