"""What is refused before a process starts, and marks of time; the recording itself is in smoke/test_profile.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fipo_megatron.config.schema import OptimizerConfig
from fipo_megatron.observability.attribution import TRAINING, RankProfile
from fipo_megatron.trainer import profiled_policy
from fipo_megatron.trainer.policy import MegatronPolicy
from fipo_megatron.trainer.policy_processes import run_policy
from fipo_megatron.trainer.profiled_policy import CALLS, DeviceRecorder, ProfiledPolicy, ProfileSettings, measure_matmul
from fipo_megatron.types import TrainingBatch
from tests.parity.memory_oracle import make_batch, make_config, write_shape


@pytest.mark.parametrize("option", ["memory_snapshot", "nsys"])
def test_what_only_cuda_has_is_refused_elsewhere(option: str) -> None:
    settings = ProfileSettings(Path(), after=1, **{option: True})
    settings.check("cuda")
    with pytest.raises(ValueError, match=rf"^--{option.replace('_', '-')} with platform = 'cpu': of CUDA alone; leave"):
        settings.check("cpu")
    traced = ProfileSettings(Path(), after=1, trace=True)
    traced.check("cpu")
    assert (settings.tools, traced.tools) == ((f"--{option.replace('_', '-')}",), ("--trace",))


def test_without_a_recording_a_call_is_the_policys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CALLS:
        assert getattr(ProfiledPolicy, name) is not getattr(MegatronPolicy, name)
    policy = ProfiledPolicy.__new__(ProfiledPolicy)
    policy.host_offload = type("Offload", (), {"offload": lambda self: calls.append("offload")})()  # type: ignore[assignment]
    calls: list[str] = []
    policy.offload()
    assert calls == ["offload"]
    for end in (policy.stop_recording, policy.measure_pair, policy.end_profile):
        with pytest.raises(AssertionError, match="begin_profile comes first"):
            end()


def test_a_matrix_product_reaches_something() -> None:
    assert measure_matmul(torch.device("cpu"), torch.float32) > 1e8


class FakeClock:
    """Moves when it is told to, in nanoseconds; stands in for the module `time` on the host and for the device."""

    def __init__(self) -> None:
        self.ns = 1_700_000_000_000_000_000

    def time_ns(self) -> int:
        return self.ns

    def monotonic(self) -> float:
        return self.ns / 1e9


class FakeEvent:
    """`torch.cuda.Event` of an idle device: passed when it is recorded, and between two float32 milliseconds."""

    clock: FakeClock

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.passed_ns: int | None = None

    def record(self) -> None:
        self.passed_ns = self.clock.ns

    def synchronize(self) -> None:
        assert self.passed_ns is not None

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.passed_ns is not None
        assert end.passed_ns is not None
        return float(np.float32((end.passed_ns - self.passed_ns) / 1e6))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    FakeEvent.clock = clock
    monkeypatch.setattr(profiled_policy, "time", clock)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return clock


def test_hours_after_its_beginning_a_device_is_timed_as_finely(clock: FakeClock) -> None:
    """Three hours: 108 times a span of 40 s with one of 0.1 ms at its end, and a minute without any."""
    recorder, spans = DeviceRecorder(), []
    for _ in range(108):
        with recorder.span("outer"):
            outer, clock.ns = clock.ns, clock.ns + 40_000_001_234
            with recorder.span("inner"):
                inner, clock.ns = clock.ns, clock.ns + 123_457
            spans += [("inner", inner, clock.ns), ("outer", outer, clock.ns)]
        clock.ns += 60_000_000_000
    found = recorder.take()
    assert [span.name for span in found] == [name for name, _, _ in spans]
    for span, (name, start, end) in zip(found, spans, strict=True):
        # float32 has 24 bits: 33 to 65 s are in steps of 3.9 us.
        assert abs((span.end - span.start) - (end - start)) <= (100 if name == "inner" else 2_000)
        assert abs(span.start - start) <= 108 * 4_000  # of two origins each time


def test_what_was_taken_does_not_move_what_comes(clock: FakeClock) -> None:
    recorder = DeviceRecorder()
    for _ in range(3):
        start = clock.ns
        with recorder.span("a"):
            clock.ns += 5_000_000
        (span,) = recorder.take()
        assert (span.start, span.end) == (start, start + 5_000_000)
        clock.ns += 500_000_000_000


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


@pytest.mark.gpu
@pytest.mark.multiproc
def test_a_rank_on_a_gpu_is_recorded(tmp_path: Path) -> None:
    """Its spans lie within its calls' and take most of them; trace and snapshot are written; recording costs little."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}
    folder = write_shape(tmp_path / "model", "Qwen2ForCausalLM", **sizes, vocab_size=100_000, num_hidden_layers=8)
    config = make_config(folder, "bfloat16", 8192, {}, "cuda")
    batch = make_batch([512] * 8, [4000] * 8, 100_000)
    ((profile,),) = run_policy(config, [(record_a_step, (folder, batch, tmp_path))], timeout_s=120)
    by_name = {name: [span for span in profile.spans if span.name == name] for name in ("logprobs", "update", TRAINING)}
    (logprobs,), (update,), (training,) = by_name["logprobs"], by_name["update"], by_name[TRAINING]
    assert logprobs.end <= update.start <= training.start < training.end <= update.end
    assert training.end - training.start > 0.8 * (update.end - update.start)
    assert profile.peak_bytes["update"] > profile.peak_bytes["logprobs"] > 1 << 30
    assert (tmp_path / "trace-rank0.json.gz").stat().st_size > 10_000
    assert (tmp_path / "memory-rank0.pickle").stat().st_size > 10_000
    assert profile.matmul_flops > 1e14
    recorded, plain = np.median(np.array(profile.pairs), axis=0)
    print(f"{profile.device}: recording {recorded / plain - 1:+.2%}, products {profile.matmul_flops:.3g} FLOP/s")
    assert recorded < 1.05 * plain


def record_a_step(policy: Any, folder: Path, batch: TrainingBatch, out: Path) -> RankProfile:
    """Log-probs and an update by a policy that has made one before, with all tools; no engine is there to sync to."""
    policy.load(folder, OptimizerConfig(), random_seed=0)
    policy.update(batch, range(batch.num_samples), 1e-5)
    policy.__class__ = ProfiledPolicy
    policy.begin_profile(ProfileSettings(out, after=1, num_pairs=8, trace=True, memory_snapshot=True))
    policy.recording.call("push_weights", lambda: None, (1,))
    policy.logprobs(batch)
    policy.update(batch, range(batch.num_samples), 1e-5)
    policy.stop_recording()
    for _ in range(8):
        policy.measure_pair()
    return policy.end_profile()
