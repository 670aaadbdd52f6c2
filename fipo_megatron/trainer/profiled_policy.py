"""A rank of the policy that records what it does: MegatronPolicy itself has nothing of it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fipo_megatron.observability.attribution import FORWARD, TRAINING, RankProfile, Workload
from fipo_megatron.observability.timers import Span, SpanRecorder
from fipo_megatron.trainer.policy import MegatronPolicy
from fipo_megatron.types import PolicyUpdate, TrainingBatch

CALLS = (
    "logprobs",
    "ref_logprobs",
    "update",
    "connect_engines",
    "push_weights",
    "offload",
    "random_states",
    "begin_save",
    "finish_save",
    "export",
)
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}  # of the product that shows what a device reaches
NUM_PRODUCTS = 8
ORIGIN_S = 1.0  # from which events of a device are timed: when the next one takes its place


@dataclass(frozen=True)
class ProfileSettings:
    """What the ranks record beside spans, from a sync of weights to the end of the run."""

    folder: Path  # for traces and snapshots
    after: int  # version of the weights whose push comes before
    num_steps: int = 1  # that are recorded after it
    num_pairs: int = 0  # gradients computed at the end with recording, and as many without: what it costs
    trace: bool = False  # torch's profiler
    memory_snapshot: bool = False  # of torch's allocator
    nsys: bool = False  # ranges, and the beginning and end of what nsys captures

    @property
    def tools(self) -> tuple[str, ...]:
        """Options of the profilers that run beside: what they cost is not measured."""
        asked = (("--trace", self.trace), ("--memory-snapshot", self.memory_snapshot), ("--nsys", self.nsys))
        return tuple(option for option, is_asked in asked if is_asked)

    def check(self, platform: str) -> None:
        """Raises ValueError for what the platform does not have."""
        for option, remedy in (
            ("--memory-snapshot", "--trace has the memory of each operation"),
            ("--nsys", "--trace has the ranges, too"),
        ):
            if option in self.tools and platform != "cuda":
                raise ValueError(f"{option} with platform = {platform!r}: of CUDA alone; leave it out, {remedy}")


class ProfiledPolicy(MegatronPolicy):
    """Records the calls in CALLS, and what is in them, once `begin_profile` was called."""

    recording: RankRecording | None = None

    def begin_profile(self, settings: ProfileSettings) -> None:
        """Begin to record; after `load`, and once."""
        self.recording = RankRecording(self, settings)

    def stop_recording(self) -> None:
        """End the spans that count, and have tools write their files; `begin_profile` comes first."""
        assert self.recording is not None, "begin_profile comes first"
        self.recording.stop()

    def measure_pair(self) -> None:
        """The same gradient with recording and without; after `stop_recording`, collective."""
        assert self.recording is not None, "begin_profile comes first"
        self.recording.measure_pair()

    def end_profile(self) -> RankProfile:
        """What was recorded. Every rank at once: their matrix products share the machine, as their work does."""
        assert self.recording is not None, "begin_profile comes first"
        recording, self.recording = self.recording, None
        return recording.result()


def _recorded(name: str) -> Callable[..., Any]:
    method = getattr(MegatronPolicy, name)

    @wraps(method)
    def call(self: ProfiledPolicy, *args: Any, **kwargs: Any) -> Any:
        if self.recording is None:
            return method(self, *args, **kwargs)
        return self.recording.call(name, partial(method, self, *args, **kwargs), args)

    return call


for _name in CALLS:
    setattr(ProfiledPolicy, _name, _recorded(_name))


class RankRecording:
    """What one rank records."""

    def __init__(self, policy: MegatronPolicy, settings: ProfileSettings) -> None:
        self.policy, self.settings = policy, settings
        self.recorder = SpanRecorder() if policy.platform.name == "cpu" else DeviceRecorder()
        self.peak_bytes: dict[str, int] = {}
        self.workloads: list[Workload] = []
        self.pairs: list[tuple[float, float]] = []
        self._calls: list[str] = []  # under way, the innermost last
        self._last_update: tuple[TrainingBatch, Any] | None = None
        self._profiler: Any = None
        self._tools_began = False
        self._recorded = self._make_recorded()
        self._plain = [(owner, name, getattr(owner, name)) for owner, name, _ in self._recorded]
        _put(self._recorded)

    def _make_recorded(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        """Functions that record, and where they belong: owner and attribute."""
        from fipo_megatron.model.schedule_spans import recorded_schedules

        policy, timed = self.policy, self.recorder.timed
        step, offload, plan = policy.step, policy.host_offload, policy.plan
        run = step._run

        def run_pass(microbatches: Any, loss: Any, forward_only: bool) -> Any:
            with self.recorder.span(FORWARD if forward_only else TRAINING):
                return run(microbatches, loss, forward_only)

        def make_plan(batch: TrainingBatch, samples: Any) -> Any:
            lengths = np.diff(batch.cu_seqlens)[list(samples)]
            num_responses = int(lengths.sum() - batch.prompt_lens[list(samples)].sum())
            self.workloads.append(Workload(self._calls[-1], time.time_ns(), lengths, num_responses))
            if self._calls[-1] == "update" and self.settings.num_pairs:  # it holds a batch of shared memory
                self._last_update = batch, samples
            return plan(batch, samples)

        return [
            *recorded_schedules(self.recorder, policy.chunks),
            (step, "_run", run_pass),
            (step, "_logprobs", timed("head", step._logprobs)),
            (policy, "plan", timed("plan", make_plan)),
            (policy, "_microbatches", timed("pack", policy._microbatches)),
            (policy, "_all_reduce", timed("reduce statistics", policy._all_reduce)),
            (policy, "_optimizer_step", timed("optimizer", policy._optimizer_step)),
            (offload, "reload", timed("reload", offload.reload)),
        ]

    def call(self, name: str, method: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """The result of a call, recorded with the memory it took."""
        platform = self.policy.platform
        self._calls.append(name)
        platform.reset_peak_memory()
        try:
            with self.recorder.span(name):
                result = method()
        finally:
            self._calls.pop()
        peak = platform.peak_memory_bytes()
        if isinstance(result, PolicyUpdate) and result.cost is not None:  # it measures its own, and begins anew
            peak = max(peak, result.cost.peak_memory_bytes)
        self.peak_bytes[name] = max(peak, self.peak_bytes.get(name, 0))
        # Also sent again, to an engine that was rebuilt or has slept.
        if (name, args) == ("push_weights", (self.settings.after,)) and not self._tools_began:
            self._tools_began = True
            self._begin_tools()
        return result

    def _begin_tools(self) -> None:
        settings = self.settings
        if settings.trace:
            # The CPU alone where there is no device, and that by default where there is one.
            self._profiler = torch.profiler.profile(profile_memory=True)
            self._profiler.start()
            self.recorder.annotate = torch.profiler.record_function
        if settings.memory_snapshot:
            torch.cuda.memory._record_memory_history()
        if settings.nsys:
            torch.cuda.cudart().cudaProfilerStart()
            self.recorder.annotate = torch.cuda.nvtx.range

    def _end_tools(self) -> None:
        settings, rank = self.settings, self.policy.rank
        self.recorder.annotate = None
        if settings.trace:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(settings.folder / f"trace-rank{rank}.json.gz"))
        if settings.memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(settings.folder / f"memory-rank{rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if settings.nsys:
            torch.cuda.cudart().cudaProfilerStop()

    def stop(self) -> None:
        """What is recorded from now on does not count; tools write their files."""
        self._end_tools()
        self._taken = self.recorder.take(), dict(self.peak_bytes), list(self.workloads)

    def result(self) -> RankProfile:
        """All that was recorded until `stop`, and what a span costs and a matrix product reaches here."""
        policy, groups = self.policy, self.policy.groups
        spans, peak_bytes, workloads = self._taken
        device = policy.platform.device
        torch.distributed.barrier(groups.world)  # products of all ranks at once
        return RankProfile(
            rank=policy.rank,
            stage=groups.pipeline.rank(),
            data=groups.data_context.rank(),
            pipeline=_first_rank(groups.pipeline),
            host=socket.gethostname(),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            dtype=policy.config.model.dtype,
            spans=spans,
            peak_bytes=peak_bytes,
            workloads=workloads,
            span_cost_s=self.recorder.cost_of_span(),
            call_cost_s=_call_cost(policy),
            matmul_flops=measure_matmul(device, getattr(torch, policy.config.model.dtype)),
            pairs=self.pairs,
        )

    def measure_pair(self) -> None:
        """Adds the seconds of the last mini-batch's gradient with recording, and without, in turns (A B, B A); no
        weight is changed. Collective; nothing where no update was made."""
        if self._last_update is None:
            return
        policy, (batch, samples) = self.policy, self._last_update
        seconds = {}
        for records in (True, False) if len(self.pairs) % 2 == 0 else (False, True):
            _put(self._recorded if records else self._plain)
            torch.distributed.barrier(policy.groups.world)
            start = time.perf_counter()
            if records:
                self.call("update", lambda: policy.backward(batch, policy.plan(batch, samples)), ())
            else:
                policy.backward(batch, policy.plan(batch, samples))
            torch.distributed.barrier(policy.groups.world)
            seconds[records] = time.perf_counter() - start
        self.pairs.append((seconds[True], seconds[False]))
        self.recorder.take()


def _put(functions: list[tuple[Any, str, Callable[..., Any]]]) -> None:
    for owner, name, function in functions:
        setattr(owner, name, function)


class DeviceRecorder(SpanRecorder):
    """Spans by a GPU's own clock: events in its stream tell when the work of a block began and ended there, so that
    nothing waits for the device.

    Between two events CUDA gives float32 milliseconds: in steps of 0.06 us after a second, of 0.1 ms after half an
    hour. So an event is timed from an origin that is seldom older than ORIGIN_S, that one from the one before it, and
    the first by the host's clock.
    """

    _renewed_s: float  # when, by the host's clock

    def __init__(self) -> None:
        super().__init__()
        self._set_origin()

    def mark(self) -> tuple[int, torch.cuda.Event]:
        """The number of an origin, and an event in the current stream."""
        number, event = len(self._origins) - 1, self._event()
        if time.monotonic() - self._renewed_s > ORIGIN_S:
            self._origins.append(event)
            self._renewed_s = time.monotonic()
        return number, event

    def nanoseconds(self, mark: tuple[int, torch.cuda.Event]) -> int:
        """When the event was passed, as the host's clock had it. Waits for the device."""
        number, event = mark
        while len(self._origins_ns) <= number:
            known = len(self._origins_ns) - 1
            self._origins_ns.append(self._after(known, self._origins[known + 1]))
        return self._after(number, event)

    def take(self) -> list[Span]:
        """What was recorded; then the clocks are compared anew."""
        taken = super().take()
        self._set_origin()
        return taken

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _after(self, number: int, event: torch.cuda.Event) -> int:
        """The time of an event, by an origin whose own is known."""
        event.synchronize()
        return self._origins_ns[number] + round(self._origins[number].elapsed_time(event) * 1e6)

    def _set_origin(self) -> None:
        torch.cuda.synchronize()
        self._origins = [self._event()]
        torch.cuda.synchronize()
        self._origins_ns = [time.time_ns()]
        self._renewed_s = time.monotonic()


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the best of a few square matrix products: a peak where no data sheet has one."""
    size = MATRIX_SIZE[device.type]
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    product = left @ right
    seconds = []
    for _ in range(NUM_PRODUCTS):
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


def _first_rank(group: torch.distributed.ProcessGroup) -> int:
    return min(torch.distributed.get_process_group_ranks(group))


def _call_cost(policy: MegatronPolicy) -> float:
    """Seconds that it takes to measure the memory of one call."""
    start = time.perf_counter()
    policy.platform.reset_peak_memory()
    policy.platform.peak_memory_bytes()
    return time.perf_counter() - start
