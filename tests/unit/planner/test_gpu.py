"""The table of GPUs: figures that a reader would check first, and what is made of them."""

import pytest

from fipo_megatron.planner.gpu import GPUS, find_gpu


def test_known_ratios_of_the_data_sheets():
    h100, h800, h20, a100 = (find_gpu(name) for name in ("h100-80gb", "h800-80gb", "h20-96gb", "a100-80gb"))
    assert h100.bf16_flops / h100.memory_bandwidth == pytest.approx(295, abs=1)  # operations a byte
    assert h800.bf16_flops == h100.bf16_flops
    assert h800.nvlink_bandwidth == 200e9
    assert h20.bf16_flops / h100.bf16_flops == pytest.approx(0.15, abs=0.001)
    assert a100.network_bandwidth == h100.network_bandwidth / 2
    assert all(
        gpu.memory_bytes < 1e9 * float(name.rsplit("-", 1)[1].removesuffix("gb")) * 1.1
        for name, gpu in GPUS.items()
        if not name.startswith("cpu")
    )


def test_float32_has_a_peak_of_its_own_on_gpus():
    h100, cpu = find_gpu("h100-80gb"), find_gpu("cpu-2cores")
    assert (h100.flops(2), h100.flops(4)) == (989e12, 67e12)
    assert cpu.flops(4) == cpu.flops(2) == 100e9
    assert all(gpu.float32_flops is not None for name, gpu in GPUS.items() if not name.startswith("cpu"))
    assert find_gpu("a100-80gb").flops(4) / find_gpu("a100-80gb").flops(2) == 1 / 16


def test_an_unknown_gpu_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"--gpu tpu: not known; choose one of h100-80gb, .*cpu-core"):
        find_gpu("tpu")
