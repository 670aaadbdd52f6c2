"""What a layer keeps, against sums made by hand. The real thing: tests/parity/test_memory_plan.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fipo_megatron.planner.activations import (
    LayerKind,
    LayerSizes,
    kept_by_layer,
    kept_by_norm,
    layer_kind,
    layer_sizes,
    most_in_backward,
    most_in_forward,
)
from tests.unit.planner.shapes import EXPERTS, make_config, make_shape

T = 128  # tokens


def sizes(kind: LayerKind, dtype: str, architecture: str = "Qwen2ForCausalLM", **parallel: Any) -> LayerSizes:
    changes = EXPERTS if "Moe" in architecture else {"head_dim": 16} if "Qwen3" in architecture else {}
    shape = make_shape(architecture, **changes)
    longest = T * parallel.get("context", 1)
    return layer_sizes(kind, dtype, make_config(parallel).parallel, shape, T, longest, 1.5)


# h = q = 64, kv = 32, i = 96, d = 16, 4 heads; of one token
ATTENTION = 3 * 64 + 2 * 32  # q, k, v, result, result in order
PRODUCT = 64 + 2 * 32


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("local_cpu", "float32", 2 * 12 * 64 + 4 * 4 * 16 + 4 * ATTENTION + 4 * 4 + 4 * 5 * 96),
        ("local_cpu", "bfloat16", 2 * 10 * 64 + 2 * 4 * 16 + 2 * ATTENTION + 4 * 4 + 2 * 5 * 96),
        ("local_cuda", "bfloat16", 2 * 4 * 64 + 2 * 4 * 16 + 2 * (2 * 64 + 32 + PRODUCT) + 4 * 4 + 2 * 5 * 96),
        ("transformer_engine", "bfloat16", 2 * 4 * 64 + 2 * (2 * 64 + 32 + PRODUCT) + 4 * 4 + 2 * 3 * 96 + 2 * 64),
    ],
)
def test_a_dense_layer(kind: LayerKind, dtype: str, expected: int) -> None:
    assert kept_by_layer(sizes(kind, dtype), "none") == T * expected


def test_tensor_and_sequence_parallelism() -> None:
    whole, halves = sizes("local_cpu", "float32"), sizes("local_cpu", "float32", tensor=2)
    norms, rotation = 2 * kept_by_norm(whole), T * 4 * 4 * 16
    assert kept_by_layer(halves, "none") == norms + rotation + (kept_by_layer(whole, "none") - norms - rotation) / 2
    shared = sizes("local_cpu", "float32", tensor=2, sequence_parallel=True)
    assert kept_by_layer(halves, "none") - kept_by_layer(shared, "none") == norms / 2


def test_recomputation() -> None:
    x = sizes("transformer_engine", "bfloat16", tensor=2, sequence_parallel=True)
    assert kept_by_layer(x, "full") == T / 2 * 64 * 2
    cpu = sizes("local_cpu", "float32")
    # Inputs of attention (q, k, the product) and its result wait instead of copies.
    saved = ATTENTION * 4 + 4 * 4 - (2 * 64 + 32 + PRODUCT) * 4
    assert kept_by_layer(cpu, "none") - kept_by_layer(cpu, "selective") == T * saved


def test_scores_where_torch_has_no_fused_kernel() -> None:
    """Of 4 heads, in float32. 128 tokens are one sequence; context-parallel ranks have two chunks of 32 of 256."""
    grouped, matrix = sizes("local_cuda", "float32"), 4 * 4 * T * T
    plain = 4 * 64 * 4 + 4 * 4 * 16 + 4 * (2 * 64 + 32 + PRODUCT) + 4 * 4 + 4 * 5 * 96
    assert kept_by_layer(grouped, "none") == T * plain + matrix
    assert most_in_forward(grouped) == 2 * T * 64 * 4 + 2.25 * matrix
    assert most_in_backward(grouped) == T * 64 * 4 + 2 * matrix
    assert kept_by_layer(grouped, "selective") == T * (plain - 4 * 4)
    assert kept_by_layer(grouped, "full") == T * 64 * 4
    cut = sizes("local_cuda", "float32", context=2)
    assert cut.scores == 4 * 4 * 64 * 256  # the later chunk sees all keys
    assert cut.kept_scores == 4 * 4 * 64 * (64 + 256)  # the first sees its own
    one_each = dataclasses.replace(grouped, kv=64)
    for fused in (one_each, sizes("local_cuda", "bfloat16"), sizes("local_cpu", "float32")):
        assert fused.scores == 0


def test_norms_of_heads() -> None:
    def added(kind: LayerKind, dtype: str) -> float:
        with_norms = kept_by_layer(sizes(kind, dtype, "Qwen3ForCausalLM"), "none")
        return (with_norms - kept_by_layer(sizes(kind, dtype), "none")) / T

    assert added("local_cpu", "float32") == 4 * (2 * 64 + 32 + PRODUCT)
    assert added("local_cpu", "bfloat16") == 4 * (2 * 64 + 2 * 32)
    assert added("transformer_engine", "bfloat16") == 2 * 64


def test_context_parallelism_gathers_keys() -> None:
    def added(kind: LayerKind, dtype: str, context: int) -> float:
        return kept_by_layer(sizes(kind, dtype, context=context), "none") - kept_by_layer(sizes(kind, dtype), "none")

    # Keys and values of 2.5 T tokens instead of T; masks of chunks of 64 queries with 64 x (1 + 4) keys in sum
    assert added("local_cpu", "float32", 2) == 1.5 * T * 2 * 32 * 4 + 64 * 64 * 5 * (1 + 4)
    assert added("transformer_engine", "bfloat16", 2) == 0
    assert added("local_cuda", "bfloat16", 4) == (4.5 * T * 2 * 32 - T * (PRODUCT + 32)) * 2


def test_experts() -> None:
    def routed(**parallel: Any) -> float:
        return sizes("local_cpu", "float32", "Qwen3MoeForCausalLM", **parallel).routed

    assert routed() == 2 * T
    assert routed(data=2, expert=2) == 1.5 * 2 * T  # the rank that gets most
    assert routed(tensor=2, sequence_parallel=True, expert_tensor=2) == 2 * T
    assert routed(tensor=2, sequence_parallel=True, expert=2) == 1.5 * T
    x = sizes("local_cpu", "float32", "Qwen3MoeForCausalLM")
    dense = sizes("local_cpu", "float32", "Qwen3ForCausalLM")
    moe = 2 * T * ((64 + 6 * 32) * 4 + 12) + T * 4 * 10
    assert kept_by_layer(x, "none") == kept_by_layer(dense, "none") - T * 5 * 96 * 4 + moe


def test_what_is_at_work() -> None:
    x = sizes("local_cpu", "float32", tensor=2, sequence_parallel=True)
    gathered = T * 64 * 4
    assert most_in_forward(x) == T * 64 * 4 + gathered + 5 * T * 48 * 4
    assert most_in_backward(x) == T / 2 * 64 * 4 + gathered + max(T * 48 + 64 * 48, 2 * T * 48) * 4
    moe = sizes("local_cpu", "float32", "Qwen3MoeForCausalLM")
    assert most_in_backward(moe) == T * 64 * 4 + 2 * 2 * T * 64 * 4 + 2 * 64 * 32 * 4


def test_kinds() -> None:
    assert layer_kind(make_config(dtype="float32", platform="cpu")) == "local_cpu"
    assert layer_kind(make_config(dtype="float32")) == "local_cuda"
    assert layer_kind(make_config()) == "transformer_engine"
    assert layer_kind(make_config(), has_transformer_engine=False) == "local_cuda"
