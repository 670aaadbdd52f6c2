"""MFU against numbers worked out by hand, and what recording costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.observability.attribution import Workload
from fipo_megatron.planner.flops import forward_flops
from fipo_megatron.planner.gpu import GPUS
from fipo_megatron.trainer.profile import find_utilisations, gpu_of_device, write_report
from tests.unit.observability.test_profile_report import make_profile

SHAPE = ModelShape(
    architecture="Qwen2ForCausalLM",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=5,
    max_positions=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
)
LENGTHS = np.array([10, 12])


def test_mfu_counts_an_update_thrice_and_log_probs_once() -> None:
    """Step 2: 200 ms, an update of 196 ms on two ranks whose products reach 10 GFLOP/s, and three devices."""
    profile = make_profile()
    start = profile.steps[0].start
    workloads = [
        Workload("update", start - 1, LENGTHS, 14),  # of the step that warms up
        Workload("logprobs", start, LENGTHS, 14),
        Workload("update", start + 1, LENGTHS, 14),
    ]
    ranks = [replace(rank, workloads=workloads) for rank in profile.ranks]
    forward = forward_flops(SHAPE, LENGTHS, 14)
    updates, steps = find_utilisations(replace(profile, ranks=ranks), SHAPE)
    assert (updates.what, steps.what) == ("the updates", "whole steps")
    assert updates.frac == pytest.approx(3 * forward / (0.196 * 2 * 10e9))
    assert steps.frac == pytest.approx(4 * forward / (0.200 * 3 * 10e9))
    assert updates.peak_name == "a matrix product on all ranks at once, 10 GFLOP/s each"

    for dtype, peak in (("bfloat16", 989e12), ("float32", 67e12)):
        on_gpus = [replace(rank, device="NVIDIA H100 80GB HBM3", dtype=dtype) for rank in ranks]
        listed = find_utilisations(replace(profile, ranks=on_gpus), SHAPE)
        assert [each.peak_flops for each in listed] == [peak] * 2 + [10e9] * 2
        assert listed[0].peak_name == f"h100-80gb's data sheet, {peak / 1e12:g} TFLOP/s in {dtype}"
    assert find_utilisations(replace(profile, ranks=[replace(ranks[0], workloads=[])]), SHAPE) == []


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_planners_gpu_of_a_device(device: str, gpu: str | None) -> None:
    assert gpu_of_device(device) == (GPUS[gpu] if gpu else None)


def test_the_report_is_three_files(tmp_path: Path) -> None:
    tables = write_report(make_profile(), SHAPE, tmp_path / "profile")
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"report.html", "profile.json", "timeline.json"}
    assert len(tables) == 8
