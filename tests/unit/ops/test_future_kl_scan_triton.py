"""The scan's kernels against a loop in float64: in the interpreter, and on a GPU where there is one."""

import pytest
import torch

from fipo_megatron.ops.future_kl_scan import future_kl_scan
from fipo_megatron.types import SegmentTable
from tests.unit.ops.kernel_cases import GAMMA_32, check_scan, list_scan_cases

CASES = list_scan_cases()
NAMES = [*map(str, CASES), "scan over 2 context-parallel ranks", "scan offsets"]


def failures(comparisons):
    return [comparison for comparison in comparisons if not comparison.holds]


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_loop_in_the_interpreter(interpreted, name):
    assert name in interpreted, "the interpreter ended before this case"
    assert len(interpreted[name]) >= 1
    assert failures(interpreted[name]) == []


def test_refuses_a_cpu_tensor_outside_of_the_interpreter():
    with pytest.raises(ValueError, match="values are on cpu"):
        future_kl_scan(torch.zeros(4), 0.5, SegmentTable(torch.tensor([0, 4])), impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *list_scan_cases(tile=1024)], ids=str)
def test_equals_the_loop_on_a_gpu(case):
    assert failures(check_scan(case, "cuda")) == []


@pytest.mark.gpu
def test_table_on_the_gpu_and_on_the_cpu_say_the_same():
    values = torch.randn(5000, device="cuda")
    table = torch.tensor([0, 100, 100, 4990, 5000])
    found = [future_kl_scan(values, GAMMA_32, SegmentTable(t), impl="triton") for t in (table, table.cuda())]
    assert torch.equal(found[0], found[1])


@pytest.mark.gpu
def test_offsets_beyond_2_to_31_on_a_gpu():
    """A segment that begins before token 2^31 and ends behind it."""
    size, start = 2**31 + 3000, 2**31 - 5000
    values = torch.zeros(size, device="cuda")
    values[start:] = torch.randn(8000, device="cuda")
    found = future_kl_scan(values, 0.999, SegmentTable(torch.tensor([0, start, size])), impl="triton")
    alone = future_kl_scan(values[start:], 0.999, SegmentTable(torch.tensor([0, 8000])), impl="triton")
    torch.testing.assert_close(found[start:], alone, rtol=1e-5, atol=1e-5)
    assert not found[:start].any()


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    values = torch.randn(5000, device="cuda")
    segments = SegmentTable(torch.tensor([0, 100, 5000]))
    future_kl_scan(values, 0.5, segments, impl="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        future_kl_scan(values, 0.5, segments, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
