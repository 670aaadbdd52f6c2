"""The log-prob kernels against float64: in the interpreter, and on a GPU where there is one."""

import pytest
import torch

from fipo_megatron.ops.token_logprob.triton_kernel import TritonRowKernels, tile_shape, vector_width
from tests.unit.ops.kernel_cases import (
    LogprobCase,
    check_logprob,
    check_logprob_offsets,
    check_odd_logits,
    list_logprob_cases,
)

CASES = list_logprob_cases()


def failures(comparisons):
    return [comparison for comparison in comparisons if not comparison.holds]


@pytest.mark.parametrize("name", [*map(str, CASES), "odd logits", "logprob offsets"])
def test_equals_float64_in_the_interpreter(interpreted, name):
    assert name in interpreted, "the interpreter ended before this case"
    assert len(interpreted[name]) >= 2
    assert failures(interpreted[name]) == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        LogprobCase(300, 7, torch.bfloat16),
        LogprobCase(1024, 32000, torch.bfloat16),
        LogprobCase(4096, 20001, torch.float16),
        LogprobCase(127, 151936, torch.bfloat16, temperature=1.7, phantom=128, first_column=151936),
        LogprobCase(127, 262144, torch.float16, in_place=True),
        LogprobCase(5000, 1000, torch.bfloat16, entropy=False, gap=8),
    ],
    ids=str,
)
def test_equals_float64_on_a_gpu(case):
    assert failures(check_logprob(case, "cuda")) == []


@pytest.mark.gpu
def test_odd_logits_on_a_gpu():
    assert failures(check_odd_logits("cuda")) == []


@pytest.mark.gpu
def test_offsets_beyond_2_to_31_on_a_gpu():
    """16384 x 152064 bfloat16 logits: what the last rows say does not depend on the rows before them."""
    assert failures(check_logprob_offsets("cuda")) == []
    logits = torch.zeros(16384, 152064, dtype=torch.bfloat16, device="cuda")
    logits[-3:] = torch.randn(3, 152064, device="cuda")
    targets = torch.arange(16384, device="cuda")
    block = {"temperature": 1.0, "first_column": 0, "num_columns": 152064}
    found = TritonRowKernels().row_statistics(logits, targets, with_entropy=True, **block)
    alone = TritonRowKernels().row_statistics(logits[-3:], targets[-3:], with_entropy=True, **block)
    for name in ("peak", "sum_exp", "sum_shifted", "target"):
        torch.testing.assert_close(getattr(found, name)[-3:], getattr(alone, name), rtol=1e-5, atol=1e-5)


def test_vectors_are_used_only_where_rows_are_made_of_them():
    block = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert vector_width(block) == 8
    assert vector_width(block.float()) == 4
    assert vector_width(block[:, 8:]) == 8
    assert vector_width(block[:, 1:]) == 1
    assert vector_width(block[:, :63]) == 1
    assert vector_width(torch.zeros(4 * 65, dtype=torch.bfloat16).view(4, 65)[:, :64]) == 1
    assert vector_width(block, block.float()) == 4
    assert vector_width(block, torch.zeros(4 * 66).view(4, 66)[:, :64]) == 1


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("num_columns", [1, 4096, 4097, 262144])
def test_a_lane_holds_16_columns(num_columns, width):
    tile = tile_shape(num_columns, width)
    assert tile["VECTORS"] * tile["WIDTH"] == 16
    assert tile["LANES"] == 32 * tile["num_warps"]


def test_refuses_a_cpu_tensor_outside_of_the_interpreter():
    block = {"temperature": 1.0, "first_column": 0, "num_columns": 8}
    with pytest.raises(ValueError, match="logits are on cpu"):
        TritonRowKernels().row_statistics(torch.zeros(2, 8), torch.zeros(2).long(), with_entropy=False, **block)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("logits", "message"),
    [(torch.zeros(2, 8).double(), "float64 has no Triton kernel"), (torch.zeros(8, 2).T, "must be contiguous")],
)
def test_refuses(logits, message):
    block = {"temperature": 1.0, "first_column": 0, "num_columns": 8}
    with pytest.raises(ValueError, match=message):
        TritonRowKernels().row_statistics(
            logits.cuda(), torch.zeros(2, device="cuda").long(), with_entropy=False, **block
        )
