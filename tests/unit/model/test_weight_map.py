"""Shards of every rule against rows picked one by one, of every family against transformers, and back again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fipo_megatron.model.hf_config import FAMILIES, ModelShape, make_model_shape, read_model_shape
from fipo_megatron.model.weight_map.entry import (
    WeightMapEntry,
    merge_shards,
    open_safetensors,
    padded_vocab_size,
    read_shard,
)
from fipo_megatron.model.weight_map.families import LAYERS, make_entries
from fipo_megatron.trainer.tiny_models import MODELS, write_model

SIZES = [1, 2]  # of tensor parallelism; the models have two key-value heads
EXPERT_SIZES = [1, 2, 4]


class CountingSlice:
    """A tensor that counts the elements that are read of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tensor.shape
        self.num_read = 0

    def __getitem__(self, index: Any) -> torch.Tensor:
        part = self.tensor[index]
        self.num_read += part.numel()
        return part


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_model(request.param, path)
    return path


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def sizes_of(entry: WeightMapEntry) -> list[int]:
    return SIZES if entry.expert is None else EXPERT_SIZES


def shards_of(name: str, folder: Path, size: int) -> list[torch.Tensor]:
    """Of the Megatron parameter `name`, one a rank."""
    shape = read_model_shape(folder)
    entry = next(entry for entry in make_entries(shape) if entry.megatron_name == name)
    return [read_shard(entry, open_safetensors(folder), shape, rank, size) for rank in range(size)]


def test_every_supported_architecture_has_a_map() -> None:
    assert LAYERS.keys() == FAMILIES.keys()


def test_the_entries_name_every_tensor_of_a_folder_once(folder: Path) -> None:
    entries = make_entries(read_model_shape(folder))
    named = Counter(name for entry in entries for name in entry.hf_names)
    assert named == Counter(list(load_tensors(folder)))
    assert len({entry.megatron_name for entry in entries}) == len(entries)


def test_all_shards_merge_back_to_the_tensors_of_the_folder(folder: Path) -> None:
    shape, tensors, source = read_model_shape(folder), load_tensors(folder), open_safetensors(folder)
    for entry in make_entries(shape):
        for size in sizes_of(entry):
            shards = [read_shard(entry, source, shape, rank, size) for rank in range(size)]
            merged = merge_shards(entry, shards, shape)
            assert merged.keys() == set(entry.hf_names)
            assert all(torch.equal(merged[name], tensors[name]) for name in merged), (entry, size)


def test_a_rank_reads_and_holds_its_share_and_no_more(folder: Path) -> None:
    shape, tensors = read_model_shape(folder), load_tensors(folder)
    for entry in make_entries(shape):
        whole = sum(tensors[name].numel() for name in entry.hf_names)
        for size in sizes_of(entry):
            num_read = 0
            for rank in range(size):
                slices = {name: CountingSlice(tensors[name]) for name in entry.hf_names}
                shard = read_shard(entry, slices.__getitem__, shape, rank, size)
                share = whole if entry.rule == "replicated" else -(-whole // size)
                padding = shape.hidden_size if entry.rule == "vocab" else 0
                assert shard.numel() <= share + padding, (entry, rank, size)
                num_read += sum(counted.num_read for counted in slices.values())
            assert num_read == whole * (size if entry.rule == "replicated" else 1)


@pytest.mark.parametrize("folder", ["qwen2", "qwen3", "llama3"], indirect=True)
def test_the_shards_of_an_mlp_add_up_to_that_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    mlp = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].mlp
    hidden = torch.randn(5, 64)
    for size in SIZES:
        fc1, fc2 = (shards_of(f"decoder.layers.1.mlp.linear_fc{i}.weight", folder, size) for i in (1, 2))
        torch.testing.assert_close(gated_mlp(hidden, fc1, fc2), mlp(hidden))


@pytest.mark.parametrize("folder", ["qwen3_moe"], indirect=True)
def test_the_shards_of_an_expert_add_up_to_that_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    experts = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").model.layers[1].mlp.experts
    hidden = torch.randn(5, 64)
    for expert in range(4):
        expected = experts(hidden, torch.full((5, 1), expert), torch.ones(5, 1))
        for size in EXPERT_SIZES:
            names = (f"decoder.layers.1.mlp.experts.{expert}.linear_fc{i}.weight" for i in (1, 2))
            fc1, fc2 = (shards_of(name, folder, size) for name in names)
            torch.testing.assert_close(gated_mlp(hidden, fc1, fc2), expected)


def gated_mlp(hidden: torch.Tensor, fc1: list[torch.Tensor], fc2: list[torch.Tensor]) -> torch.Tensor:
    """As Megatron computes it on the ranks that hold these shards."""
    partial_sums = []
    for up, down in zip(fc1, fc2, strict=True):
        gate, linear = F.linear(hidden, up).chunk(2, dim=-1)
        partial_sums.append(F.linear(F.silu(gate) * linear, down))
    return torch.stack(partial_sums).sum(0)


@pytest.mark.parametrize("folder", ["qwen2", "qwen3"], indirect=True)
@pytest.mark.parametrize("size", SIZES)
def test_qkv_holds_query_heads_key_and_value_group_by_group(folder: Path, size: int) -> None:
    tensors, head = load_tensors(folder), read_model_shape(folder).head_dim
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    rows = []
    for group in range(2):
        rows += [q[query * head + i] for query in (2 * group, 2 * group + 1) for i in range(head)]
        rows += [k[group * head + i] for i in range(head)] + [v[group * head + i] for i in range(head)]
    shards = shards_of("decoder.layers.1.self_attention.linear_qkv.weight", folder, size)
    assert torch.equal(torch.cat(shards), torch.stack(rows))
    assert {len(shard) for shard in shards} == {len(rows) // size}


def test_gate_rows_stand_over_up_rows_in_every_shard() -> None:
    gate, up = torch.arange(24.0).view(12, 2), torch.arange(24.0, 48.0).view(12, 2)
    entry = WeightMapEntry("fc1", ("gate", "up"), "gated")
    source = {"gate": gate, "up": up}.__getitem__
    assert torch.equal(read_shard(entry, source, a_shape(), 2, 4), torch.cat([gate[6:9], up[6:9]]))


@pytest.mark.parametrize(
    ("vocab_size", "size", "real_rows"), [(11, 4, [3, 3, 3, 2]), (5, 4, [2, 2, 1, 0]), (8, 2, [4, 4])]
)
def test_the_padded_vocabulary_has_zero_rows_at_its_end(vocab_size: int, size: int, real_rows: list[int]) -> None:
    head = torch.arange(1.0, 1 + vocab_size)[:, None]
    entry, shape = WeightMapEntry("head", ("lm_head",), "vocab"), a_shape(vocab_size=vocab_size)
    shards = [read_shard(entry, {"lm_head": head}.__getitem__, shape, rank, size) for rank in range(size)]
    assert [int((shard > 0).sum()) for shard in shards] == real_rows
    assert len({len(shard) for shard in shards}) == 1
    full = torch.cat(shards)
    assert len(full) == padded_vocab_size(vocab_size, size)
    assert torch.equal(full[:vocab_size], head)
    assert not full[vocab_size:].any()


def a_shape(**changes: Any) -> ModelShape:
    sizes = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
    }
    return make_model_shape({"architectures": ["Qwen2ForCausalLM"], **sizes, **changes}, "here")
