"""How one Megatron parameter is cut from, and merged back into, Hugging Face tensors under tensor parallelism.

Pure tensor slicing: no Megatron, no process groups. A source is anything that slices like a tensor (a torch tensor or a
safetensors slice, of which only the wanted part is read).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open

from fipo_megatron.model.hf_config import ModelShape

ShardRule = Literal["replicated", "vocab", "row", "qkv", "gated"]
LayerRow = tuple[str, tuple[str, ...], ShardRule]  # Megatron's name, Hugging Face's names, both without the layer


@dataclass(frozen=True)
class WeightMapEntry:
    """One Megatron parameter, named with its global layer and expert number.

    Rules: `vocab` is cut along dim 0, padded with zero rows to the padded vocabulary; `row` along dim 1; `qkv` holds,
    for each key-value group, its query heads, key head and value head, and is cut by groups; `gated` holds gate rows
    over up rows, each cut along dim 0.
    """

    megatron_name: str
    hf_names: tuple[str, ...]
    rule: ShardRule
    expert: int | None = None  # whose it is: cut over expert-tensor-parallel ranks then, not over tensor-parallel ones


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """The vocabulary size rounded up so that every tensor-parallel rank holds the same number of rows."""
    return -(-vocab_size // tensor_parallel_size) * tensor_parallel_size


def read_shard(
    entry: WeightMapEntry, source: Callable[[str], Any], shape: ModelShape, rank: int, size: int
) -> torch.Tensor:
    """What tensor-parallel rank `rank` of `size` holds of a Megatron parameter, read from `source(hf_name)`."""
    tensors = [source(name) for name in entry.hf_names]
    if entry.rule == "replicated":
        return tensors[0][:]
    if entry.rule == "vocab":
        rows = padded_vocab_size(shape.vocab_size, size) // size
        start, end = (min(r * rows, shape.vocab_size) for r in (rank, rank + 1))
        shard = tensors[0][start:end]
        return F.pad(shard, (0, 0, 0, rows - shard.shape[0]))
    if entry.rule == "row":
        columns = _lengths(tensors[0])[1] // size
        return tensors[0][:, rank * columns : (rank + 1) * columns]
    if entry.rule == "gated":
        rows = _lengths(tensors[0])[0] // size
        return torch.cat([tensor[rank * rows : (rank + 1) * rows] for tensor in tensors])
    groups = shape.num_key_value_heads // size
    parts = []
    for tensor, rows in zip(tensors, qkv_rows(shape), strict=True):
        part = tensor[rank * groups * rows : (rank + 1) * groups * rows]
        parts.append(part.reshape(groups, rows, *part.shape[1:]))
    return torch.cat(parts, dim=1).flatten(0, 1)


def merge_shards(entry: WeightMapEntry, shards: Sequence[torch.Tensor], shape: ModelShape) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors `{name: tensor}` that the shards of all tensor-parallel ranks, in order, make up.

    Of a replicated parameter one shard is enough.
    """
    if entry.rule == "replicated":
        merged = [shards[0]]
    elif entry.rule == "vocab":
        merged = [torch.cat(list(shards))[: shape.vocab_size]]
    elif entry.rule == "row":
        merged = [torch.cat(list(shards), dim=1)]
    elif entry.rule == "gated":
        halves = [shard.chunk(2) for shard in shards]
        merged = [torch.cat([half[i] for half in halves]) for i in range(2)]
    else:
        rows = qkv_rows(shape)
        full = torch.cat(list(shards))
        by_group = full.reshape(shape.num_key_value_heads, sum(rows), *full.shape[1:])
        merged = [part.flatten(0, 1) for part in by_group.split(list(rows), dim=1)]
    return {name: tensor.contiguous() for name, tensor in zip(entry.hf_names, merged, strict=True)}


def qkv_rows(shape: ModelShape) -> tuple[int, int, int]:
    """Rows of query, key and value that one key-value group holds."""
    queries = shape.num_attention_heads // shape.num_key_value_heads * shape.head_dim
    return queries, shape.head_dim, shape.head_dim


def _lengths(source: Any) -> Sequence[int]:
    """Of the dimensions of a torch tensor or a safetensors slice."""
    return source.get_shape() if hasattr(source, "get_shape") else source.shape


def hf_tensor_shape(hf_name: str, shape: ModelShape) -> tuple[int, ...]:
    """The shape of a Hugging Face tensor of the families' tables, by its name."""
    *_, module, kind = hf_name.split(".")
    hidden, heads = shape.hidden_size, shape.head_dim * shape.num_attention_heads
    key_values = shape.head_dim * shape.num_key_value_heads
    intermediate = shape.moe_intermediate_size if ".experts." in hf_name else shape.intermediate_size
    shapes = {
        "embed_tokens": (shape.vocab_size, hidden),
        "lm_head": (shape.vocab_size, hidden),
        "q_proj": (heads, hidden),
        "k_proj": (key_values, hidden),
        "v_proj": (key_values, hidden),
        "o_proj": (hidden, heads),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
        "gate": (shape.num_experts, hidden),
        "q_norm": (shape.head_dim,),
        "k_norm": (shape.head_dim,),
    }
    if module in shapes:
        return shapes[module][:1] if kind == "bias" else shapes[module]
    assert module.endswith("norm"), hf_name
    return (hidden,)


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
