"""Attention over packed sequences: what CUDA's variable-length kernel is told says the same as the slow twin."""

from __future__ import annotations

import inspect
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from fipo_megatron.model import local_layers
from fipo_megatron.model.local_layers import LocalAttention, PackedSequences, pack_sequences
from fipo_megatron.parallel.context import zigzag_positions

RANKS = [(rank, size) for size in (1, 2, 4) for rank in range(size)]
VARLEN_SIGNATURE = inspect.signature(varlen.varlen_attn)
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


@pytest.fixture(autouse=True)
def gathered_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of the tests are those of all ranks already."""
    monkeypatch.setattr(local_layers, "_AllGatherSequence", SimpleNamespace(apply=lambda gathered, group: gathered))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """LocalAttention of one rank."""
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS)
    groups: Any = SimpleNamespace(cp=RankOfGroup(rank, size))
    attention = LocalAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    return attention(query, key, value, packed_seq_params=make_packed(rank, size, query.device.type))


def attend_each_run(*args: Any, **settings: Any) -> torch.Tensor:
    """What the kernel does, on a CPU and in float32: runs of queries with runs of keys, aligned at their ends."""
    call = VARLEN_SIGNATURE.bind(*args, **settings).arguments
    assert call["window_size"] == (-1, 0)  # causal: every key up to the query's own
    contexts = []
    for cu_lens, longest in ((call["cu_seq_q"], call["max_q"]), (call["cu_seq_k"], call["max_k"])):
        assert cu_lens.dtype == torch.int32
        assert cu_lens.diff().max() == longest
    assert call["cu_seq_q"][-1] == len(call["query"])
    assert call["cu_seq_k"][-1] == len(call["key"]) == len(call["value"])
    for (q_start, q_end), (k_start, k_end) in zip(
        pairwise(call["cu_seq_q"].tolist()), pairwise(call["cu_seq_k"].tolist()), strict=True
    ):
        queries, keys, values = (
            x.float().transpose(0, 1)[None]
            for x in (call["query"][q_start:q_end], call["key"][k_start:k_end], call["value"][k_start:k_end])
        )
        num_queries, num_keys = q_end - q_start, k_end - k_start
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        context = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=call["scale"], enable_gqa=call["enable_gqa"]
        )
        contexts.append(context[0].transpose(0, 1))
    return torch.cat(contexts)


@pytest.mark.parametrize(("rank", "size"), RANKS)
def test_what_the_kernel_is_told_says_what_the_slow_twin_does(
    rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = [x.bfloat16() for x in make_inputs(rank, size)]
    expected = attend(*(x.float() for x in rounded), rank, size)
    monkeypatch.setattr(varlen, "varlen_attn", attend_each_run)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # takes the branch of a GPU; the tensors stay where they are
    torch.testing.assert_close(attend(*rounded, rank, size), expected, rtol=0, atol=1e-6)


def test_the_slow_twin_is_attention_over_each_sequence() -> None:
    """By one process on whole sequences in float64, for every rank's queries."""
    query, key, value = (x.double() for x in make_inputs(0, 1))
    whole = []
    for start, end in pairwise([0, *torch.tensor(LENS).cumsum(0).tolist()]):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        context = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        whole.append(context[0].transpose(0, 1).flatten(1))
    expected = torch.cat(whole)
    for rank, size in RANKS:
        found = attend(*make_inputs(rank, size), rank, size)
        torch.testing.assert_close(found.double(), expected[zigzag_positions(LENS, rank, size)], rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "size"), RANKS)
def test_the_kernel_on_a_gpu_equals_the_slow_twin(rank: int, size: int) -> None:
    found, expected = [], []
    for dtype, results in ((torch.bfloat16, found), (torch.float32, expected)):
        inputs = [x.bfloat16().to("cuda", dtype).requires_grad_() for x in make_inputs(rank, size)]
        context = attend(*inputs, rank, size)
        context.float().square().sum().backward()
        results += [context, *(x.grad for x in inputs)]
    for ours, exact in zip(found, expected, strict=True):
        assert ours is not None
        assert exact is not None
        assert (ours.float() - exact).norm() <= 0.02 * exact.norm()
