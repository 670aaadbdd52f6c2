"""The scan against the O(L^2) definition, F_t = sum over k >= t of gamma^(k - t) x_k, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fipo_megatron.ops.future_kl_scan import future_kl_scan
from fipo_megatron.types import SegmentTable

IMPLEMENTATIONS = ("auto", "torch", "numba", "reference")  # in the interpreter: test_future_kl_scan_triton.py


def make_segments(lengths: list[int]) -> SegmentTable:
    return SegmentTable(torch.tensor([0, *lengths]).cumsum(0))


def scan_by_definition(values: torch.Tensor, gamma: float, lengths: list[int]) -> torch.Tensor:
    parts = []
    for x in values.double().split(lengths):
        t = torch.arange(len(x))
        powers = gamma ** t.double()
        parts.append(powers[(t[None, :] - t[:, None]).clamp(min=0)].triu() @ x)
    return torch.cat(parts)


@pytest.mark.parametrize(
    "lengths",
    [[1], [0, 3, 0], [64, 64], [63, 65, 1], [64 * 64 + 1, 2], [130] * 3, [0, 0]],
    ids=str,
)
@pytest.mark.parametrize("half_life", [0.5, 32.0, 256.0])
def test_equals_the_definition(lengths, half_life):
    torch.manual_seed(0)
    gamma = 2 ** (-1 / half_life)
    values = torch.randn(sum(lengths), dtype=torch.float64)
    expected = scan_by_definition(values, gamma, lengths)
    for impl in IMPLEMENTATIONS:
        found = future_kl_scan(values, gamma, make_segments(lengths), impl=impl)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    gamma=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_packed_equals_padded_equals_one_by_one(lengths, gamma, seed):
    values = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pieces = values.split(lengths)
    packed = future_kl_scan(values, gamma, make_segments(lengths))
    alone = torch.cat([future_kl_scan(x, gamma, make_segments([len(x)])) for x in pieces])
    width = max(lengths)
    rows = torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in pieces])
    padded = future_kl_scan(rows.flatten(), gamma, make_segments([width] * len(pieces))).view_as(rows)
    unpadded = torch.cat([row[:n] for row, n in zip(padded, lengths, strict=True)])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed, unpadded, rtol=1e-12, atol=1e-12)


def test_nothing_crosses_a_boundary():
    values = torch.zeros(300, dtype=torch.float64)
    values[150:] = 1e300
    found = future_kl_scan(values, 0.999, make_segments([150, 150]))
    assert torch.equal(found[:150], torch.zeros(150, dtype=torch.float64))


def test_vanished_decay_does_no_harm():
    """0.5^20000 is 0 even in float64; dividing by it would not be."""
    values = torch.ones(20_000)
    found = future_kl_scan(values, 0.5, make_segments([20_000]))
    torch.testing.assert_close(found[:10_000], torch.full((10_000,), 2.0))


def test_float32_error_is_that_of_its_inputs():
    torch.manual_seed(0)
    lengths = [4000, 77]
    values, gamma = torch.randn(sum(lengths)), 2 ** (-1 / 256)
    exact = scan_by_definition(values, gamma, lengths)
    found = future_kl_scan(values, gamma, make_segments(lengths))
    assert found.dtype == torch.float32
    assert ((found - exact).norm() / exact.norm()).item() < 1e-6


def test_carries_no_gradient_and_leaves_values_alone():
    values = torch.ones(70, requires_grad=True)
    assert not future_kl_scan(values, 0.9, make_segments([70])).requires_grad
    assert torch.equal(values.detach(), torch.ones(70))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "impl='fast'"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"values": torch.zeros(2, 2)}, r"values is torch.float32 \[2, 2\]"),
        ({"values": torch.zeros(4, dtype=torch.bfloat16)}, "bfloat16"),
    ],
)
def test_refuses(change, message):
    arguments = {"values": torch.zeros(4), "gamma": 0.5, "segments": make_segments([4])} | change
    with pytest.raises(ValueError, match=message):
        future_kl_scan(**arguments)


@pytest.mark.parametrize("impl", ["auto", "torch", "numba", "reference"])
@pytest.mark.parametrize(
    ("cu_seqlens", "cu_chunks", "name"),
    [
        ([0, 30], None, "cu_seqlens"),  # beyond the values: compiled code would write there
        ([0, 4], None, "cu_seqlens"),
        ([2, 10], None, "cu_seqlens"),
        ([0, 7, 3, 10], None, "cu_seqlens"),
        ([], None, "cu_seqlens"),
        ([0, 10], [0, 4, 11], "cu_chunks"),
    ],
)
def test_refuses_the_table_of_other_values(impl, cu_seqlens, cu_chunks, name):
    table = SegmentTable(
        torch.tensor(cu_seqlens, dtype=torch.int64), None if cu_chunks is None else torch.tensor(cu_chunks)
    )
    with pytest.raises(ValueError, match=rf"{name} is \[.*rise from 0 to the 10 values"):
        future_kl_scan(torch.zeros(10), 0.5, table, impl=impl)
