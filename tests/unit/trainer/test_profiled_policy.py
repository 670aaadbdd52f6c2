"""What is refused before a process starts, and marks of time; the recording itself is in smoke/test_profile.py."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from fipo_megatron.trainer.policy import MegatronPolicy
from fipo_megatron.trainer.profiled_policy import CALLS, DeviceRecorder, ProfiledPolicy, ProfileSettings, measure_matmul


@pytest.mark.parametrize("option", ["memory_snapshot", "nsys"])
def test_what_only_cuda_has_is_refused_elsewhere(option: str) -> None:
    settings = ProfileSettings(Path(), after=1, **{option: True})
    settings.check("cuda")
    with pytest.raises(ValueError, match=rf"^--{option.replace('_', '-')} with platform = 'cpu': of CUDA alone; leave"):
        settings.check("cpu")
    ProfileSettings(Path(), after=1, trace=True).check("cpu")


def test_without_a_recording_a_call_is_the_policys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CALLS:
        assert getattr(ProfiledPolicy, name) is not getattr(MegatronPolicy, name)
    policy = ProfiledPolicy.__new__(ProfiledPolicy)
    policy.host_offload = type("Offload", (), {"offload": lambda self: calls.append("offload")})()  # type: ignore[assignment]
    calls: list[str] = []
    policy.offload()
    assert calls == ["offload"]
    with pytest.raises(AssertionError, match="begin_profile comes first"):
        policy.end_profile()


def test_a_matrix_product_reaches_something() -> None:
    assert measure_matmul(torch.device("cpu"), torch.float32) > 1e8


@pytest.mark.gpu
def test_spans_of_a_device_are_those_of_its_work() -> None:
    """The host asks for products and goes on; their span is as long as the device computes, inside the host's times."""
    recorder = DeviceRecorder()
    matrix = torch.ones(4096, 4096, device="cuda")
    start = time.time_ns()
    with recorder.span("outer"), recorder.span("products"):
        for _ in range(20):
            matrix @ matrix
    asked = time.time_ns()
    products, outer = recorder.take()
    end = time.time_ns()
    assert (products.name, outer.name) == ("products", "outer")
    slack = 1_000_000  # of the comparison of clocks
    assert start - slack < outer.start <= products.start < products.end <= outer.end < end + slack
    assert products.end > asked
