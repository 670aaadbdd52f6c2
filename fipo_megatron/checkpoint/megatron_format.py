"""Names, global shapes and places of a model's parameters in Megatron-Core's distributed checkpoint. Plain data.

Megatron stacks a parameter of all layers into one global tensor `[layers, ...]`, of all experts `[layers, experts,
...]`, and saves each rank's part as a chunk of it, at an offset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import WeightMapEntry, hf_tensor_shape, padded_vocab_size, qkv_rows

LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
EXPERT_NAME = re.compile(r"mlp\.experts\.(\d+)\.(.*)")
# Megatron's layer specs save a norm under the name that it has inside Transformer Engine's fused layer.
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
LINEARS = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class CheckpointLayout:
    """The ranks whose parts a checkpoint is cut into. It can be loaded by any other layout, too."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    expert: int = 1
    expert_tensor: int = 1

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage that have something of their own to save."""
        return max(self.tensor, self.expert * self.expert_tensor)

    def check(self, shape: ModelShape) -> None:
        """Raises ValueError where the model can't be cut so."""
        chunks = self.pipeline * (self.virtual_pipeline or 1)
        demands = [
            ("pp * vpp", chunks, "num_hidden_layers", shape.num_layers),
            ("tp", self.tensor, "num_key_value_heads", shape.num_key_value_heads),
            ("ep", self.expert, "num_experts", shape.num_experts),
            ("etp", self.expert_tensor, "moe_intermediate_size", shape.moe_intermediate_size),
        ]
        if not shape.num_experts:
            demands.append(("tp", self.tensor, "intermediate_size", shape.intermediate_size))
        for name, size in vars(self).items():
            if size is not None and size < 1:
                raise ValueError(f"{name} = {size}: must be at least 1")
        for option, size, key, number in demands:
            if number % size or (number == 0 and size > 1):
                raise ValueError(f"{option} = {size} does not divide the model's {key} = {number}; use a divisor of it")

    def stage_of(self, layer: int, num_layers: int) -> int:
        """The pipeline stage that holds a layer; with virtual stages each holds several runs of layers."""
        return layer // (num_layers // (self.pipeline * (self.virtual_pipeline or 1))) % self.pipeline


@dataclass(frozen=True)
class GlobalTensor:
    """A Megatron parameter as a box of a global tensor of the checkpoint."""

    key: str
    shape: tuple[int, ...]  # of the global tensor
    prefix: tuple[int, ...]  # the parameter's place in its first dimensions: none, layer, or layer and expert


def parameter_shape(entry: WeightMapEntry, shape: ModelShape, vocab_rows: int) -> tuple[int, ...]:
    """The whole Megatron parameter's shape, of a vocabulary of `vocab_rows` rows where that is its first dimension."""
    lengths = [hf_tensor_shape(name, shape) for name in entry.hf_names]
    rows = vocab_rows if entry.rule == "vocab" else sum(length[0] for length in lengths)
    return (rows, *lengths[0][1:])


def find_global_tensors(entry: WeightMapEntry, shape: ModelShape, vocab_rows: int) -> list[GlobalTensor]:
    """The places where a checkpoint may have a parameter: the one that is written first, then what else is read.

    A layer's norms have another name where the layer spec is not fused, and a model whose layers differ in kind has
    every layer's tensors by themselves.
    """
    own = parameter_shape(entry, shape, vocab_rows)
    match = LAYER_NAME.fullmatch(entry.megatron_name)
    if match is None:
        return [GlobalTensor(entry.megatron_name, own, ())]
    layer, name = int(match[1]), match[2]
    expert = EXPERT_NAME.fullmatch(name)
    prefix: tuple[int, ...] = (layer,)
    stacked: tuple[int, ...] = (shape.num_layers,)
    if expert:
        name = f"mlp.experts.experts.{expert[2]}"
        prefix, stacked = (layer, int(expert[1])), (shape.num_layers, shape.num_experts)
    names = [FUSED_NORMS[name], name] if name in FUSED_NORMS else [name]
    found = [GlobalTensor(f"decoder.layers.{n}", (*stacked, *own), prefix) for n in names]
    return found + [GlobalTensor(f"decoder.layers.{layer}.{n}", (*stacked[1:], *own), prefix[1:]) for n in names]


def written_tensors(entry: WeightMapEntry, shape: ModelShape, vocab_rows: int) -> list[GlobalTensor]:
    """The places where a converted checkpoint has a parameter.

    More than one for the norm before experts: Transformer Engine's layers have no linear layer there to fuse it with.
    """
    found = find_global_tensors(entry, shape, vocab_rows)
    twice = shape.num_experts and entry.megatron_name.endswith(".pre_mlp_layernorm.weight")
    return found[:2] if twice else found[:1]


@dataclass(frozen=True)
class Rows:
    """Rows of a Hugging Face tensor: `count` from `start` on, which are those from `offset` on of the parameter."""

    tensor: int  # which of the entry's tensors
    start: int
    count: int
    offset: int


@dataclass(frozen=True)
class Chunk:
    """The part of a parameter that one rank saves as one piece."""

    shard: int  # tensor-parallel rank, among those of its kind
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: tuple[Rows, ...]  # where its rows come from; those that no tensor has are zeros


def cut_chunks(entry: WeightMapEntry, shape: ModelShape, size: int) -> Iterator[Chunk]:
    """The chunks of a parameter that is cut over `size` ranks. Each tensor's rows come in ascending order, but for
    `row`, which is cut by columns: each chunk then names all rows.
    """
    rows, *rest = parameter_shape(entry, shape, padded_vocab_size(shape.vocab_size, size))
    zeros = (0,) * len(rest)
    if entry.rule == "replicated":
        yield Chunk(0, (0, *zeros), (rows, *rest), (Rows(0, 0, rows, 0),))
    elif entry.rule == "row":
        columns = rest[0] // size
        for shard in range(size):
            yield Chunk(shard, (0, shard * columns), (rows, columns), (Rows(0, 0, rows, 0),))
    elif entry.rule == "gated":
        half = rows // 2
        for tensor in range(2):
            for shard in range(size):
                start, count = shard * half // size, half // size
                source = Rows(tensor, start, count, 0)
                yield Chunk(shard, (tensor * half + start, *zeros), (count, *rest), (source,))
    elif entry.rule == "vocab":
        count = rows // size
        for shard in range(size):
            start, end = (min(r * count, shape.vocab_size) for r in (shard, shard + 1))
            yield Chunk(shard, (shard * count, *zeros), (count, *rest), (Rows(0, start, end - start, 0),))
    else:
        groups = shape.num_key_value_heads // size
        for shard in range(size):
            sources = tuple(
                Rows(tensor, (shard * groups + group) * part, part, group * sum(qkv_rows(shape)) + before)
                for group in range(groups)
                for tensor, (part, before) in enumerate(_parts_of_group(shape))
            )
            yield Chunk(shard, (shard * rows // size, *zeros), (rows // size, *rest), sources)


def rows_of_tensor(entry: WeightMapEntry, tensor: int, shape: ModelShape) -> list[tuple[int, int]]:
    """The ranges of a parameter's rows, `(start, count)`, that one after the other are an entry's tensor."""
    rows = hf_tensor_shape(entry.hf_names[tensor], shape)[0]
    if entry.rule == "gated":
        return [(tensor * rows, rows)]
    if entry.rule == "qkv":
        part, before = _parts_of_group(shape)[tensor]
        return [(group * sum(qkv_rows(shape)) + before, part) for group in range(shape.num_key_value_heads)]
    return [(0, rows)]


def _parts_of_group(shape: ModelShape) -> list[tuple[int, int]]:
    """Of query, key and value: their rows in one key-value group, and the rows before them."""
    queries, key, value = qkv_rows(shape)
    return [(queries, 0), (key, queries), (value, queries + key)]


def owner_stage(entry: WeightMapEntry, shape: ModelShape, layout: CheckpointLayout) -> int:
    """The pipeline stage that saves a parameter."""
    match = LAYER_NAME.fullmatch(entry.megatron_name)
    if match:
        return layout.stage_of(int(match[1]), shape.num_layers)
    return 0 if entry.megatron_name.startswith("embedding.") else layout.pipeline - 1


def owner_rank(entry: WeightMapEntry, shard: int, stage: int, shape: ModelShape, layout: CheckpointLayout) -> int:
    """The rank that saves a shard: of all, where tensor- and then expert-parallel ranks follow each other."""
    within = shard
    if entry.expert is not None:
        within += entry.expert // (shape.num_experts // layout.expert) * layout.expert_tensor
    return stage * layout.stage_size + within


def extra_states(shape: ModelShape) -> Iterator[tuple[str, int]]:
    """Keys of the objects that Megatron asks for beside the tensors, one a linear layer, and the layer. All are None:
    they describe float8 weights.
    """
    layers = shape.num_layers
    for layer in range(layers):
        for linear in LINEARS:
            if shape.num_experts and linear.startswith("mlp."):
                name = linear.replace("mlp.", "mlp.experts.experts.")
                for expert in range(shape.num_experts):
                    suffix = f"shard_{layer}.{expert}_{layers}.{shape.num_experts}"
                    yield f"decoder.layers.{name}._extra_state/{suffix}", layer
            else:
                yield f"decoder.layers.{linear}._extra_state/shard_{layer}_{layers}", layer
