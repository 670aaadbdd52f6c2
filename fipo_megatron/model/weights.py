"""Weights between a Hugging Face folder and this rank's Megatron shards, in any layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from safetensors import safe_open

from fipo_megatron.model.build import named_parameters
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import WeightMapEntry, merge_shards, read_shard
from fipo_megatron.model.weight_map.qwen2 import make_entries
from fipo_megatron.parallel.groups import ParallelGroups

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


class PolicyWeights:
    """The policy's weights under their Hugging Face names, read and written shard by shard."""

    def __init__(self, model: DistributedDataParallel, shape: ModelShape, groups: ParallelGroups) -> None:
        self.shape = shape
        self.groups = groups
        self.entries = make_entries(shape)
        self.parameters = dict(named_parameters(model))
        self._shard_of = self._locate_shards()

    def load(self, folder: Path) -> None:
        """Fill this rank's parameters from a Hugging Face folder; only the slices that this rank holds are read.

        Raises:
            ValueError: the folder lacks a tensor.
        """
        by_name = {entry.megatron_name: entry for entry in self.entries}
        if self.shape.tie_word_embeddings:  # the last stage of a pipeline holds a copy of the embedding as its head
            by_name[HEAD] = by_name[EMBEDDING]
        source = open_safetensors(folder)
        rank, size = self.groups.tensor.rank(), self.groups.tensor.size()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                shard = read_shard(by_name[name], source, self.shape, rank, size)
                assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
                parameter.copy_(shard)

    def metadata(self) -> list[tuple[str, tuple[int, ...], str]]:
        """`(name, shape, dtype)` of every tensor that `gather` yields, in its order. Not a collective."""
        metas = []
        for entry in self.entries:
            _, shape, dtype = self._shard_of[entry.megatron_name]
            shard = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            merged = merge_shards(entry, [shard] * self.groups.tensor.size(), self.shape)
            metas += [(name, tuple(tensor.shape), dtype) for name, tensor in merged.items()]
        return metas

    def gather(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors `(Hugging Face name, tensor)` on rank 0, one after the other; nothing elsewhere.

        Collective over the tensor- and pipeline-parallel ranks of the first replica: all must run it to the end.
        """
        if not self.groups.is_replica_leader:
            return
        for entry in self.entries:
            shard = self._bring_to_first_stage(entry)
            if not self.groups.is_first_stage:
                continue
            shards = [torch.empty_like(shard) for _ in range(self.groups.tensor.size())]
            dist.all_gather(shards, shard, group=self.groups.tensor)
            if self.groups.tensor.rank() == 0:
                yield from merge_shards(entry, shards, self.shape).items()

    def _bring_to_first_stage(self, entry: WeightMapEntry) -> torch.Tensor:
        """This tensor-parallel rank's shard, sent from the stage that holds it to the first."""
        stage, shape, dtype = self._shard_of[entry.megatron_name]
        pipeline = self.groups.pipeline
        if pipeline.rank() == stage:
            shard = self.parameters[entry.megatron_name].detach().contiguous()
            if stage != 0:
                dist.send(shard, group=pipeline, group_dst=0)
            return shard
        shard = torch.empty(shape, dtype=getattr(torch, dtype), device=next(iter(self.parameters.values())).device)
        if pipeline.rank() == 0:
            dist.recv(shard, group=pipeline, group_src=stage)
        return shard

    def _locate_shards(self) -> dict[str, tuple[int, tuple[int, ...], str]]:
        """For every Megatron parameter: the first stage that holds it, its shard's shape and dtype. Collective."""
        own = {
            name: (self.groups.pipeline.rank(), tuple(p.shape), str(p.dtype).removeprefix("torch."))
            for name, p in self.parameters.items()
        }
        stages: list[Any] = [None] * self.groups.pipeline.size()
        dist.all_gather_object(stages, own, group=self.groups.pipeline)
        located: dict[str, tuple[int, tuple[int, ...], str]] = {}
        for stage in reversed(stages):
            located.update(stage)
        return located


def open_safetensors(folder: Path) -> Callable[[str], Any]:
    """A function from a tensor's name to its lazily read safetensors slice.

    Raises:
        ValueError: (when called) no file of the folder holds the tensor.
    """
    index = folder / "model.safetensors.index.json"
    files: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    opened: dict[str, Any] = {}

    def get_slice(name: str) -> Any:
        file = files.get(name, "model.safetensors")
        try:
            if file not in opened:
                opened[file] = safe_open(folder / file, framework="pt")
            return opened[file].get_slice(name)
        except Exception as error:
            raise ValueError(
                f"model.path: {folder} has no tensor {name!r} in {file}; is the download complete?"
            ) from error

    return get_slice
