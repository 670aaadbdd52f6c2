"""Weights between a Hugging Face folder and this rank's Megatron shards, in any layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from fipo_megatron.model.build import named_parameters
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import WeightMapEntry, merge_shards, open_safetensors, read_shard
from fipo_megatron.model.weight_map.families import make_entries
from fipo_megatron.parallel.groups import ParallelGroups

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


class Shards(NamedTuple):
    """Where the shards of a Megatron parameter are: one replica's ranks, in shard order, and what each holds."""

    ranks: list[int]
    shape: tuple[int, ...]
    dtype: str  # e.g. "bfloat16"


class PolicyWeights:
    """The policy's weights under their Hugging Face names, read and written shard by shard."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], shape: ModelShape, groups: ParallelGroups) -> None:
        self.shape = shape
        self.groups = groups
        self.entries = make_entries(shape)
        self.parameters = dict(named_parameters(chunks))
        self._shards = self._locate_shards()

    def load(self, folder: Path) -> None:
        """Fill this rank's parameters from a Hugging Face folder; only the slices that this rank holds are read.

        Raises:
            ValueError: the folder lacks a tensor.
        """
        by_name = {entry.megatron_name: entry for entry in self.entries}
        if self.shape.tie_word_embeddings:  # the last stage of a pipeline holds a copy of the embedding as its head
            by_name[HEAD] = by_name[EMBEDDING]
        source = open_safetensors(folder)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                cut, _ = self._groups_of(by_name[name])
                shard = read_shard(by_name[name], source, self.shape, cut.rank(), cut.size())
                assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
                parameter.copy_(shard)

    def gather(self, values: Mapping[str, torch.Tensor] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors `(Hugging Face name, tensor)` on rank 0, one after the other; nothing elsewhere.

        Of the parameters, or of `values` of the parameters' names, shapes and dtypes, e.g. their gradients.
        Collective: all ranks must run it to the end.
        """
        values = self.parameters if values is None else values
        rank = self.groups.world.rank()
        for entry in self.entries:
            holders = self._shards[entry.megatron_name].ranks
            if rank == 0:
                shards = [self._receive(entry, holder, values) for holder in holders]
                yield from merge_shards(entry, shards, self.shape).items()
            elif rank in holders:
                dist.send(values[entry.megatron_name].detach().contiguous(), 0)

    def _receive(self, entry: WeightMapEntry, holder: int, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if holder == 0:
            return values[entry.megatron_name].detach()
        _, shape, dtype = self._shards[entry.megatron_name]
        shard = torch.empty(shape, dtype=getattr(torch, dtype), device=next(iter(self.parameters.values())).device)
        dist.recv(shard, holder)
        return shard

    def _groups_of(self, entry: WeightMapEntry) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The ranks that the parameter is cut over, and those that hold the same shard."""
        if entry.expert is None:
            return self.groups.tensor, self.groups.data_context
        return self.groups.expert_tensor, self.groups.expert_data

    def _locate_shards(self) -> dict[str, Shards]:
        """For every Megatron parameter, its shards in the first replica. Collective."""
        own = {}
        for entry in self.entries:
            parameter = self.parameters.get(entry.megatron_name)
            cut, replicas = self._groups_of(entry)
            is_copy = entry.rule == "replicated" and cut.rank() > 0
            if parameter is not None and replicas.rank() == 0 and not is_copy:
                own[entry.megatron_name] = (tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        everyone: list[Any] = [None] * self.groups.world.size()
        dist.all_gather_object(everyone, own)
        located: dict[str, Shards] = {}
        for rank, held in enumerate(everyone):  # ranks of one stage follow each other in shard order
            for name, (shape, dtype) in held.items():
                located.setdefault(name, Shards([], shape, dtype)).ranks.append(rank)
        return located
