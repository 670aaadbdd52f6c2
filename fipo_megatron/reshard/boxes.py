"""What a rank holds and what an engine's worker stores of a model, as boxes of Hugging Face tensors. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import LayerRow, WeightMapEntry, hf_tensor_shape, padded_vocab_size, qkv_rows
from fipo_megatron.model.weight_map.families import EMBEDDING, FINAL_NORM, HEAD, LAYERS, is_expert, layer_entry

ENGINE_VOCAB_MULTIPLE = 64  # to which vLLM and SGLang pad a vocabulary before they cut it


class Box(NamedTuple):
    """A rectangle of a matrix; a vector is a matrix of one column."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def num_elements(self) -> int:
        return self.rows * self.columns

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The box of a tensor of one or two dimensions, as a view [rows, columns]."""
        matrix = tensor if tensor.dim() == 2 else tensor[:, None]
        return matrix[self.row : self.row + self.rows, self.column : self.column + self.columns]

    def intersect(self, other: Box) -> Box:
        """What two boxes share; of no elements where they share nothing."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        columns = min(self.column + self.columns, other.column + other.columns) - column
        return Box(row, max(rows, 0), column, max(columns, 0))

    def relative_to(self, origin: Box) -> Box:
        """The same box, counted from another's first row and column."""
        return Box(self.row - origin.row, self.rows, self.column - origin.column, self.columns)

    def moved_by(self, origin: Box) -> Box:
        """The inverse: a box that was counted from another's first row and column."""
        return Box(self.row + origin.row, self.rows, self.column + origin.column, self.columns)


@dataclass(frozen=True)
class TensorKind:
    """Hugging Face tensors of one shape and cut: one of each layer, or of each layer and expert, or a single one that
    comes before or after the layers."""

    place: Literal["before", "layers", "after"]
    row: LayerRow  # Megatron's name, Hugging Face's names, rule; those of layers without the layer
    part: int  # which of the Hugging Face tensors
    shape: tuple[int, int]  # of each; a vector has one column

    @property
    def rule(self) -> str:
        return self.row[2]

    @property
    def is_expert(self) -> bool:
        return is_expert(self.row)

    @property
    def whole(self) -> Box:
        return Box(0, self.shape[0], 0, self.shape[1])

    def names(self, layer: int, expert: int | None) -> tuple[str, str]:
        """`(Hugging Face name, Megatron name)` of one of them; layer and expert count where it has any."""
        entry = layer_entry(self.row, layer, expert) if self.place == "layers" else WeightMapEntry(*self.row)
        return entry.hf_names[self.part], entry.megatron_name


def tensor_kinds(shape: ModelShape) -> list[TensorKind]:
    """Every tensor of a model, in the order of the forward pass."""

    def kinds(place: Literal["before", "layers", "after"], row: LayerRow) -> list[TensorKind]:
        return [TensorKind(place, row, part, _matrix(name, shape)) for part, name in enumerate(row[1])]

    def as_row(entry: WeightMapEntry) -> LayerRow:
        return entry.megatron_name, entry.hf_names, entry.rule

    found = kinds("before", as_row(EMBEDDING))
    for row in LAYERS[shape.architecture]:
        found += kinds("layers", row)
    found += kinds("after", as_row(FINAL_NORM))
    if not shape.tie_word_embeddings:
        found += kinds("after", as_row(HEAD))
    return found


def shard_boxes(kind: TensorKind, shape: ModelShape, shard: int, size: int) -> list[tuple[Box, Box]]:
    """The boxes `(in the shard, in the Hugging Face tensor)` of a kind that Megatron's shard `shard` of `size` has."""
    rows, columns = kind.shape
    if kind.rule == "replicated":
        return [(kind.whole, kind.whole)]
    if kind.rule == "row":
        width = columns // size
        return [(Box(0, rows, 0, width), Box(0, rows, shard * width, width))]
    if kind.rule == "gated":  # gate rows over up rows
        height = rows // size
        return [(Box(kind.part * height, height, 0, columns), Box(shard * height, height, 0, columns))]
    if kind.rule == "vocab":
        height = padded_vocab_size(rows, size) // size
        held = Box(shard * height, height, 0, columns).intersect(kind.whole)
        return [(Box(0, held.rows, 0, columns), held)]
    # qkv: every key-value group's query rows, key rows and value rows, one group after the other, cut evenly
    parts = qkv_rows(shape)
    group_rows, own_rows, offset = sum(parts), parts[kind.part], sum(parts[: kind.part])
    height = group_rows * shape.num_key_value_heads // size
    boxes = []
    for group in range(shape.num_key_value_heads):
        in_whole = Box(group * group_rows + offset, own_rows, 0, columns)
        held = in_whole.intersect(Box(shard * height, height, 0, columns))
        in_tensor = Box(group * own_rows + held.row - in_whole.row, held.rows, 0, columns)
        boxes.append((Box(held.row - shard * height, held.rows, 0, columns), in_tensor))
    return [pair for pair in boxes if pair[0].num_elements]


def engine_box(kind: TensorKind, shape: ModelShape, tensor_rank: int, size: int) -> Box:
    """The box of a kind's tensors that tensor-parallel worker `tensor_rank` of `size` stores in vLLM and SGLang.

    Keys and values of fewer heads than workers are held by several; experts are cut as dense layers are.
    """
    rows, columns = kind.shape
    if kind.rule == "replicated":
        return kind.whole
    if kind.rule == "row":
        width = columns // size
        return Box(0, rows, tensor_rank * width, width)
    if kind.rule == "vocab":
        height = padded_vocab_size(rows, ENGINE_VOCAB_MULTIPLE) // size
        return Box(tensor_rank * height, height, 0, columns).intersect(kind.whole)
    if kind.rule == "qkv" and kind.part > 0 and shape.num_key_value_heads < size:
        head = tensor_rank * shape.num_key_value_heads // size
        return Box(head * shape.head_dim, shape.head_dim, 0, columns)
    height = rows // size
    return Box(tensor_rank * height, height, 0, columns)


def _matrix(hf_name: str, shape: ModelShape) -> tuple[int, int]:
    name = hf_name if hf_name.startswith(("model.", "lm_head")) else f"model.layers.0.{hf_name}"
    rows, *columns = hf_tensor_shape(name, shape)
    return rows, columns[0] if columns else 1
