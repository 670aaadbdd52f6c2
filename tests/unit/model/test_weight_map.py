"""Shards of every rule against rows picked one by one, and back again."""

from __future__ import annotations

import itertools

import pytest
import torch

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import WeightMapEntry, merge_shards, padded_vocab_size, read_shard
from fipo_megatron.model.weight_map.qwen2 import make_entries

SHAPE = ModelShape(
    architecture="Qwen2ForCausalLM",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=3,
    max_positions=16,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
)


def hf_tensors() -> dict[str, torch.Tensor]:
    """Every element is distinct over all tensors."""
    count = itertools.count()
    shapes = {
        "model.embed_tokens.weight": (11, 8),
        "lm_head.weight": (11, 8),
        "model.norm.weight": (8,),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (8,),
            f"{prefix}.post_attention_layernorm.weight": (8,),
            f"{prefix}.self_attn.q_proj.weight": (24, 8),
            f"{prefix}.self_attn.k_proj.weight": (12, 8),
            f"{prefix}.self_attn.v_proj.weight": (12, 8),
            f"{prefix}.self_attn.q_proj.bias": (24,),
            f"{prefix}.self_attn.k_proj.bias": (12,),
            f"{prefix}.self_attn.v_proj.bias": (12,),
            f"{prefix}.self_attn.o_proj.weight": (8, 24),
            f"{prefix}.mlp.gate_proj.weight": (12, 8),
            f"{prefix}.mlp.up_proj.weight": (12, 8),
            f"{prefix}.mlp.down_proj.weight": (8, 12),
        }
    return {
        name: torch.tensor([next(count) for _ in range(torch.Size(size).numel())], dtype=torch.float64).reshape(size)
        for name, size in shapes.items()
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_shards_merge_back_to_every_hf_tensor(size: int) -> None:
    tensors = hf_tensors()
    merged = {}
    for entry in make_entries(SHAPE):
        shards = [read_shard(entry, tensors.__getitem__, SHAPE, rank, size) for rank in range(size)]
        merged |= merge_shards(entry, shards, SHAPE)
    assert sorted(merged) == sorted(tensors)
    assert all(torch.equal(merged[name], tensors[name]) for name in tensors)


def test_qkv_holds_query_heads_key_and_value_group_by_group() -> None:
    tensors = hf_tensors()
    entry = next(
        e for e in make_entries(SHAPE) if e.megatron_name == "decoder.layers.1.self_attention.linear_qkv.weight"
    )
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    shard = read_shard(entry, tensors.__getitem__, SHAPE, 1, 2)  # groups 2 and 3 of 4
    rows = []
    for group in (2, 3):
        rows += [q[head * 3 + i] for head in (2 * group, 2 * group + 1) for i in range(3)]
        rows += [k[group * 3 + i] for i in range(3)] + [v[group * 3 + i] for i in range(3)]
    assert torch.equal(shard, torch.stack(rows))


def test_gate_rows_stand_over_up_rows_in_every_shard() -> None:
    tensors = hf_tensors()
    entry = WeightMapEntry("fc1", ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"), "gated")
    gate, up = (tensors[name] for name in entry.hf_names)
    assert torch.equal(read_shard(entry, tensors.__getitem__, SHAPE, 2, 4), torch.cat([gate[6:9], up[6:9]]))


def test_the_padded_vocabulary_has_zero_rows_at_its_end() -> None:
    tensors = hf_tensors()
    entry = WeightMapEntry("head", ("lm_head.weight",), "vocab")
    assert padded_vocab_size(11, 4) == 12
    last = read_shard(entry, tensors.__getitem__, SHAPE, 3, 4)
    assert torch.equal(last[:2], tensors["lm_head.weight"][9:])
    assert torch.equal(last[2:], torch.zeros(1, 8, dtype=torch.float64))


def test_a_tied_model_has_no_head_of_its_own() -> None:
    tied = ModelShape(**{**vars(SHAPE), "tie_word_embeddings": True})
    assert {e.megatron_name for e in make_entries(SHAPE)} - {e.megatron_name for e in make_entries(tied)} == {
        "output_layer.weight"
    }
