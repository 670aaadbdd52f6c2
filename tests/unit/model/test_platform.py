from __future__ import annotations

import importlib.metadata

import pytest
import torch

from fipo_megatron.config.schema import ParallelConfig
from fipo_megatron.model.platform import (
    CPU_PATCHES,
    Platform,
    check_cpu_versions,
    prepare_for_experts,
    prepare_process,
    resolve_platform,
)

EVERY = {"current_device", "factories", "random_state", "tensor_type", "synchronize", "cuda_moves"}


def test_patches_of_the_oldest_megatron() -> None:
    assert {patch.name for patch in CPU_PATCHES if patch.needed_by(ParallelConfig())} == EVERY


def test_a_newer_megatron_asks_for_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.2")
    assert {patch.name for patch in CPU_PATCHES if patch.needed_by(ParallelConfig())} == EVERY | {"current_stream"}


def test_cuda_is_left_alone() -> None:
    assert prepare_process(Platform("cuda"), ParallelConfig(tensor=2)) == []


def test_experts_need_no_other_streams_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    before = torch.cuda.Stream, torch.cuda.stream, token_dispatcher.maybe_move_tensor_to_cpu
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    monkeypatch.delattr(moe_utils, "te_general_gemm")  # as 0.16 without Transformer Engine
    prepare_for_experts(Platform("cuda"))
    assert moe_utils.te_general_gemm is None
    assert before == (torch.cuda.Stream, torch.cuda.stream, token_dispatcher.maybe_move_tensor_to_cpu)


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0"])
def test_an_untested_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "megatron-core" else real(name))
    with pytest.raises(ValueError, match=f"megatron-core >= 0.16.1, < 0.20, found {version}"):
        check_cpu_versions()


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="platform=cpu"):
        resolve_platform("cuda")
    assert resolve_platform("auto").name == "cpu"


def test_peak_memory_is_that_since_it_was_reset() -> None:
    cpu = Platform("cpu")
    cpu.reset_peak_memory()
    start = cpu.peak_memory_bytes()
    torch.ones(64 << 20, dtype=torch.uint8)
    assert cpu.peak_memory_bytes() - start == pytest.approx(64 << 20, abs=4 << 20)
    cpu.reset_peak_memory()
    assert cpu.peak_memory_bytes() - start < 8 << 20
