"""Attention over packed sequences: what CUDA's variable-length kernel is told says the same as the slow twin."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fipo_megatron.model.local_layers import LocalAttention, PackedSequences, pack_sequences
from fipo_megatron.parallel.context import zigzag_positions

LENS = (16, 8, 32, 8)
HEADS, KEY_HEADS, DIM = 4, 2, 64


class RankOfGroup:
    """As much of a context-parallel group as its members' arithmetic needs."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def make_packed(rank: int, size: int, device: str = "cpu") -> PackedSequences:
    cu_seqlens = torch.tensor([0, *LENS]).cumsum(0).int().to(device)
    return pack_sequences(cu_seqlens, RankOfGroup(rank, size))  # type: ignore[arg-type]


def make_inputs(rank: int, size: int) -> list[torch.Tensor]:
    """This rank's queries, and keys and values gathered rank by rank."""
    generator = torch.Generator().manual_seed(0)
    query, *others = (
        torch.randn(sum(LENS), heads, DIM, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    by_rank = torch.cat([zigzag_positions(LENS, other, size) for other in range(size)])
    return [query[zigzag_positions(LENS, rank, size)], *(x[by_rank] for x in others)]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    """LocalAttention without the processes around it."""
    attention: Any = SimpleNamespace(softmax_scale=None)
    attention._attend = lambda *args: LocalAttention._attend(attention, *args)
    return LocalAttention._attend_packed(attention, query, key, value, packed)


def attend_runs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    """What the kernel does: runs of queries with runs of keys, aligned at their ends."""
    if packed.key_index is not None:
        key, value = key[packed.key_index], value[packed.key_index]
    contexts = []
    for (q_start, q_end), (k_start, k_end) in zip(
        pairwise(packed.cu_query_lens.tolist()), pairwise(packed.cu_key_lens.tolist()), strict=True
    ):
        queries, keys, values = (
            x.transpose(0, 1)[None] for x in (query[q_start:q_end], key[k_start:k_end], value[k_start:k_end])
        )
        num_queries, num_keys = q_end - q_start, k_end - k_start
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        context = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        contexts.append(context[0].transpose(0, 1))
    return torch.cat(contexts).flatten(1)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (0, 4), (2, 4), (3, 4)])
def test_runs_of_the_kernel_say_what_the_slow_twin_does(rank: int, size: int) -> None:
    packed = make_packed(rank, size)
    assert max(packed.query_lens) == packed.cu_query_lens.diff().max()
    assert max(packed.key_lens) == packed.cu_key_lens.diff().max()
    inputs = make_inputs(rank, size)
    torch.testing.assert_close(attend_runs(*inputs, packed), attend(*inputs, packed), rtol=0, atol=1e-6)


def test_the_slow_twin_is_attention_over_each_sequence() -> None:
    """By one process on whole sequences in float64, for every rank's queries."""
    query, key, value = (x.double() for x in make_inputs(0, 1))
    whole = []
    for start, end in pairwise([0, *torch.tensor(LENS).cumsum(0).tolist()]):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        context = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        whole.append(context[0].transpose(0, 1).flatten(1))
    expected = torch.cat(whole)
    for size in (1, 2, 4):
        for rank in range(size):
            found = attend(*make_inputs(rank, size), make_packed(rank, size))
            torch.testing.assert_close(found.double(), expected[zigzag_positions(LENS, rank, size)], rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_the_kernel_on_a_gpu_equals_the_slow_twin(rank: int, size: int) -> None:
    found, expected = [], []
    for dtype, results in ((torch.bfloat16, found), (torch.float32, expected)):
        inputs = [x.bfloat16().to("cuda", dtype).requires_grad_() for x in make_inputs(rank, size)]
        context = attend(*inputs, make_packed(rank, size, "cuda"))
        context.float().square().sum().backward()
        results += [context, *(x.grad for x in inputs)]
    for ours, exact in zip(found, expected, strict=True):
        assert ours is not None
        assert exact is not None
        assert (ours.float() - exact).norm() <= 0.02 * exact.norm()
