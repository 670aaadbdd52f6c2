"""What shards hold, against shards cut by the weight map, and tensors' shapes against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fipo_megatron.model.hf_config import FAMILIES, read_model_shape
from fipo_megatron.model.weight_map.entry import hf_tensor_shape, read_shard
from fipo_megatron.model.weight_map.families import make_entries
from fipo_megatron.reshard.boxes import Box, engine_box, shard_boxes, tensor_kinds
from fipo_megatron.trainer.tiny_models import MODELS, write_model
from tests.unit.reshard.shapes import small_shape


@pytest.mark.parametrize("name", MODELS)
def test_kinds_are_the_tensors_of_a_folder(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path)
    shape = read_model_shape(tmp_path)
    tensors = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert {key: hf_tensor_shape(key, shape) for key in tensors} == tensors
    names = [
        kind.names(layer, expert)[0]
        for kind in tensor_kinds(shape)
        for layer in (range(shape.num_layers) if kind.place == "layers" else [0])
        for expert in (range(shape.num_experts) if kind.is_expert else [None])
    ]
    assert sorted(names) == sorted(tensors)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_shards_boxes_make_up_the_shard(architecture: str, size: int) -> None:
    shape = small_shape(architecture)
    counter = 0
    tensors = {}
    for entry in make_entries(shape):
        for name in entry.hf_names:
            dims = hf_tensor_shape(name, shape)
            numbers = torch.arange(counter, counter + torch.Size(dims).numel())
            tensors[name], counter = numbers.reshape(dims) + 1, counter + numbers.numel()  # 0 is padding
    entries = {entry.megatron_name: entry for entry in make_entries(shape)}
    rebuilt: dict[tuple[str, int], torch.Tensor] = {}
    for kind in tensor_kinds(shape):
        hf_name, parameter = kind.names(layer=2, expert=3)
        for shard in range(size):
            expected = read_shard(entries[parameter], tensors.__getitem__, shape, shard, size)
            built = rebuilt.setdefault((parameter, shard), torch.zeros_like(expected))
            for in_shard, in_tensor in shard_boxes(kind, shape, shard if kind.rule != "replicated" else 0, size):
                in_shard.of(built).add_(in_tensor.of(tensors[hf_name]))  # adds: a box twice would show
    for (parameter, shard), built in rebuilt.items():
        expected = read_shard(entries[parameter], tensors.__getitem__, shape, shard, size)
        torch.testing.assert_close(built, expected, rtol=0, atol=0)


def test_more_ranks_than_key_value_heads_cut_inside_a_group() -> None:
    # Two groups of four query heads, one key and one value head of two rows: twelve rows each, six a rank.
    shape = small_shape("Qwen3ForCausalLM", num_key_value_heads=2)
    kinds = {kind.names(0, None)[0].split(".")[-2]: kind for kind in tensor_kinds(shape)}

    def rows(name: str, shard: int) -> list[tuple[int, int, int]]:
        boxes = shard_boxes(kinds[name], shape, shard, 4)
        return [(in_shard.row, in_tensor.row, in_tensor.rows) for in_shard, in_tensor in boxes]

    assert rows("q_proj", 0) == [(0, 0, 6)]
    assert rows("q_proj", 1) == [(0, 6, 2)]
    assert rows("k_proj", 1) == [(2, 0, 2)]
    assert rows("v_proj", 1) == [(4, 0, 2)]
    assert rows("v_proj", 0) == []
    assert rows("q_proj", 3) == [(0, 14, 2)]
    assert rows("k_proj", 3) == [(2, 2, 2)]


def test_key_value_heads_are_copied_where_an_engine_has_more_workers() -> None:
    shape = small_shape("Qwen3ForCausalLM", num_key_value_heads=2)
    key = next(kind for kind in tensor_kinds(shape) if kind.names(0, None)[0].endswith("k_proj.weight"))
    assert [engine_box(key, shape, rank, 4).row for rank in range(4)] == [0, 0, 2, 2]
    assert [engine_box(key, shape, rank, 2).row for rank in range(2)] == [0, 2]


def test_vocabulary_is_padded_before_an_engine_cuts_it() -> None:
    shape = small_shape("Qwen3ForCausalLM")  # 70 rows: padded to 128
    embedding = tensor_kinds(shape)[0]
    assert [engine_box(embedding, shape, rank, 4) for rank in range(4)] == [
        Box(0, 32, 0, 6),
        Box(32, 32, 0, 6),
        Box(64, 6, 0, 6),
        Box(96, 0, 0, 6),
    ]


def test_boxes() -> None:
    tensor = torch.arange(12).reshape(3, 4)
    assert Box(1, 2, 1, 2).of(tensor).tolist() == [[5, 6], [9, 10]]
    assert Box(1, 2, 0, 1).of(torch.arange(4)).tolist() == [[1], [2]]
    assert Box(0, 3, 0, 4).intersect(Box(2, 5, 3, 5)) == Box(2, 1, 3, 1)
    assert Box(0, 1, 0, 1).intersect(Box(1, 1, 0, 1)).num_elements == 0
    assert Box(2, 1, 3, 1).relative_to(Box(2, 5, 1, 5)) == Box(0, 1, 2, 1)
    assert Box(0, 1, 2, 1).moved_by(Box(2, 5, 1, 5)) == Box(2, 1, 3, 1)
