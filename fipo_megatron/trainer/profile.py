"""Records a training run: its driver, the policy's ranks and the engines. The report is observability's."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape, read_model_shape
from fipo_megatron.observability.attribution import RankProfile, StepTime, Workload, time_by_name
from fipo_megatron.observability.attribution import inside_steps as spans_in
from fipo_megatron.observability.compare_report import Table
from fipo_megatron.observability.metrics import read_metrics
from fipo_megatron.observability.profile_report import (
    RunProfile,
    Utilisation,
    chrome_trace,
    profile_json,
    profile_page,
    profile_tables,
)
from fipo_megatron.observability.timers import SpanRecorder
from fipo_megatron.planner.flops import forward_flops, training_flops
from fipo_megatron.planner.gpu import GPUS, Gpu
from fipo_megatron.planner.parameters import bytes_of_type
from fipo_megatron.trainer.bundles import num_devices
from fipo_megatron.trainer.profiled_policy import ProfiledPolicy, ProfileSettings

if TYPE_CHECKING:
    from fipo_megatron.trainer.run import Run

WARM_UP_STEPS = 1  # beside step 0: what is made once, and caches that are empty
FOLDER = "profile"  # in the run's folder


class Profile:
    """What is recorded of one run, from its beginning."""

    policy_kind = ProfiledPolicy

    def __init__(self, config: Config, settings: ProfileSettings) -> None:
        self.config, self.settings = config, settings
        self.result: RunProfile | None = None  # when the training has ended
        self.model_shape: ModelShape | None = None

    @asynccontextmanager
    async def recording(self, run: Run) -> AsyncIterator[None]:
        """Records what the block trains. What fails in it is raised, and then there is no result."""
        policy, engines = run.workers.policy, run.workers.engines
        driver, calls = SpanRecorder(), SpanRecorder()
        self.settings.folder.mkdir(parents=True, exist_ok=True)  # where all ranks can write
        await policy.begin_profile(self.settings)
        run.timers.recorder, policy.recorder = driver, calls
        by_engine = {f"engine {replica}": SpanRecorder() for replica in range(len(engines))}
        for engine, recorder in zip(engines, by_engine.values(), strict=True):
            engine.recorder = recorder
        run.timers.restart()
        yield
        policy.recorder = None
        ranks = await policy.end_profile(self.settings)
        engine_spans = {name: recorder.take() for name, recorder in by_engine.items()}
        peaks = [await engine.peak_memory_bytes() for engine in run.workers.engines]
        self.result = RunProfile(
            name=run.folder.name,
            first_step=WARM_UP_STEPS + 1,
            driver=driver.take(),
            calls=calls.take(),
            engines=engine_spans,
            engine_peak_bytes=dict(zip(by_engine, peaks, strict=True)),
            ranks=ranks,
            metrics=read_metrics(run.folder / "metrics.jsonl"),
            num_devices=num_devices(self.config),
            driver_span_cost_s=SpanRecorder().cost_of_span(),
            tools=self.settings.tools,
        )
        self.model_shape = read_model_shape(run.model_folder)


def write_report(profile: RunProfile, shape: ModelShape, folder: Path) -> list[Table]:
    """Write report.html, profile.json and timeline.json (Chrome's trace events) to a folder; the report's tables."""
    folder.mkdir(exist_ok=True)
    (folder / "timeline.json").write_text(json.dumps(chrome_trace(profile.processes)), encoding="utf-8")
    utilisations = find_utilisations(profile, shape)
    tables = profile_tables(profile, utilisations)
    texts = {
        "report.html": profile_page(profile, tables),
        "profile.json": json.dumps(profile_json(profile, utilisations), indent=2),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return tables


def find_utilisations(profile: RunProfile, shape: ModelShape) -> list[Utilisation]:
    """MFU of the updates and of whole steps, by each peak that is known.

    Updates: 3 forward passes' operations on their samples, over the time of the updates' calls and the ranks' peak.
    Steps: these and one forward pass for each pass of log-probs, over the whole step and the peak of all devices, those
    of the engines included. Sampling's own operations don't count.
    """
    steps, ranks = profile.steps, profile.ranks
    workloads = [each for each in ranks[0].workloads if any(step.start <= each.start < step.end for step in steps)]
    training = sum(_flops(each, shape) for each in workloads if each.call == "update")
    total = training + sum(_flops(each, shape) for each in workloads if each.call != "update")
    _, updates_s = time_by_name(spans_in(profile.calls, steps)).get("update", (0, 0.0))
    if not training:
        return []
    return [
        Utilisation(what, flops, seconds, devices, peak, peak_name)
        for peak, peak_name in find_peaks(ranks)
        for what, flops, seconds, devices in (
            ("the updates", training, updates_s, len(ranks)),
            ("whole steps", total, _seconds_without_eval(steps), profile.num_devices),
        )
    ]


def _flops(workload: Workload, shape: ModelShape) -> float:
    count = training_flops if workload.call == "update" else forward_flops
    return count(shape, workload.lengths, workload.num_response_tokens)


def _seconds_without_eval(steps: list[StepTime]) -> float:
    return sum(step.seconds - step.phases.get("eval", 0.0) for step in steps)


def find_peaks(ranks: list[RankProfile]) -> list[tuple[float, str]]:
    """Operations per second of a device in the model's type, by its data sheet where that is known, and of a matrix
    product measured."""
    gpu = gpu_of_device(ranks[0].device)
    listed = []
    if gpu is not None:
        dtype = ranks[0].dtype
        peak = gpu.flops(bytes_of_type(dtype))
        listed = [(peak, f"{gpu.name}'s data sheet, {peak / 1e12:g} TFLOP/s in {dtype}")]
    measured = sum(rank.matmul_flops for rank in ranks) / len(ranks)
    return [*listed, (measured, f"a matrix product on all ranks at once, {measured / 1e9:.4g} GFLOP/s each")]


def gpu_of_device(device: str) -> Gpu | None:
    """The GPU of the planner's table with a device's name as CUDA gives it, e.g. `NVIDIA H100 80GB HBM3`; none for the
    slower boards of that name, and for a part of one."""
    words = device.lower().replace("-", " ").split()
    if {"pcie", "nvl", "mig"} & set(words):
        return None
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words and "nvidia" in words), None)
