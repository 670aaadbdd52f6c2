"""The compiled loop against the reference; shapes and refusals of all implementations: test_future_kl_scan.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fipo_megatron.ops.future_kl_scan import future_kl_scan, numba_kernel
from fipo_megatron.ops.future_kl_scan.reference import scan_reference
from fipo_megatron.types import SegmentTable

ROOT = Path(__file__).parents[3]


def make_segments(lengths: list[int]) -> SegmentTable:
    return SegmentTable(torch.tensor([0, *lengths]).cumsum(0))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2 ** (-1 / 32), 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference(dtype, gamma):
    """Lengths with every remainder of the four tokens that are summed together."""
    torch.manual_seed(0)
    lengths = [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 63, 64, 65, 1000]
    values = torch.randn(sum(lengths), dtype=dtype)
    found = future_kl_scan(values, gamma, make_segments(lengths), impl="numba")
    exact = scan_reference(values.double(), gamma, make_segments(lengths))
    assert found.dtype == dtype
    limit = 1e-13 if dtype == torch.float64 else 1e-7
    assert ((found.double() - exact).abs() / exact.abs().clamp(min=1)).max().item() <= limit


def test_a_rounded_decay_does_not_add_up():
    """gamma = 0.9999 as float32 would be off by 1e-4 of F after 10,000 tokens."""
    values, segments = torch.ones(50_000), make_segments([50_000])
    exact = scan_reference(values.double(), 0.9999, segments)
    found = future_kl_scan(values, 0.9999, segments, impl="numba").double()
    assert ((found - exact) / exact).abs().max().item() < 1e-7


def test_strided_values_and_int32_tables():
    values = torch.arange(20.0)[::2]
    found = future_kl_scan(values, 0.5, SegmentTable(torch.tensor([0, 4, 10], dtype=torch.int32)), impl="numba")
    torch.testing.assert_close(found, scan_reference(values, 0.5, make_segments([4, 6])))


def test_compiles_where_no_cache_can_be_written(monkeypatch):
    import numba

    real = numba.njit

    def njit(cache: bool = False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", njit)
    compiled = numba_kernel.compile_scan.__wrapped__()
    values, result = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    compiled(values.numpy(), 0.5, torch.tensor([0, 3]).numpy(), result.numpy())
    assert result.tolist() == [1.75, 1.5, 1.0]


def test_numba_is_loaded_by_the_first_call():
    code = (
        "import sys, torch\n"
        "from fipo_megatron.ops.future_kl_scan import future_kl_scan, numba_kernel\n"
        "from fipo_megatron.types import SegmentTable\n"
        "assert 'numba' not in sys.modules\n"
        "future_kl_scan(torch.ones(3), 0.5, SegmentTable(torch.tensor([0, 3])))\n"
        "assert 'numba' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=True)


def test_refuses_another_device():
    with pytest.raises(ValueError, match="values are on meta"):
        future_kl_scan(torch.zeros(4, device="meta"), 0.5, make_segments([4]), impl="numba")
