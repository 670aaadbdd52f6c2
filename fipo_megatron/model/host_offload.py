"""Parameters, gradients and optimizer state in host memory while no phase needs them: room for others on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

PIECE_BYTES = 1 << 28  # torch rounds pinned memory up to a power of 2, which would double a large buffer

Part = Literal["parameters", "gradients", "optimizer"]


class HostOffload:
    """Moves whole storages away and back, and never a tensor: every view of one, and all who share it, stay valid.

    Megatron's own functions give the optimizer new tensors, which float32 parameters would then no longer share. Host
    memory is pinned and kept, so that after the first time none is allocated; it takes what parameters and optimizer
    state do. Gradients are freed, not copied. On a CPU only they leave memory free: the rest moves within it.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._chunks = chunks
        self._optimizer = optimizer
        self._host: dict[int, list[torch.Tensor]] = {}  # pieces of its bytes, by the storage's own address
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
                if part == "gradients":
                    continue
                for piece, source in zip(self._host_pieces(storage), _pieces_of(storage), strict=True):
                    piece.copy_(source, non_blocking=True)
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
                    torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
                    continue
                for piece, target in zip(self._host[storage._cdata], _pieces_of(storage), strict=True):
                    target.copy_(piece, non_blocking=True)

    def _host_pieces(self, storage: torch.UntypedStorage) -> list[torch.Tensor]:
        sizes = [len(piece) for piece in _pieces_of(storage)]
        pieces = self._host.get(storage._cdata, [])
        if [len(piece) for piece in pieces] != sizes:
            is_pinned = storage.device.type == "cuda"
            pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned) for size in sizes]
            self._host[storage._cdata] = pieces
        return pieces


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


def _pieces_of(storage: torch.UntypedStorage) -> tuple[torch.Tensor, ...]:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).split(PIECE_BYTES)
