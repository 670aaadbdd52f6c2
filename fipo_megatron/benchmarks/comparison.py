"""One benchmark: every variant is held against float64, then its memory is measured, then all are timed in turns."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fipo_megatron.benchmarks.memory import peak_in_new_process, peak_on_cuda
from fipo_megatron.benchmarks.operation import (
    Operation,
    Results,
    UnavailableError,
    Variant,
    Workload,
    largest_error,
    relative_error,
)
from fipo_megatron.benchmarks.report import Row
from fipo_megatron.benchmarks.timing import Call, Timing, make_clock, measure, summarize

Note = Callable[[str], None]

# Beyond these, relative to the largest value or 1, a result is wrong; other libraries may round to bfloat16 anywhere.
ERROR_BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Settings:
    """How a workload is measured."""

    with_others: bool = False
    num_samples: int = 20
    max_seconds: float = 20.0  # of samples a variant
    num_threads: int = 1
    with_memory: bool = True
    memory_tokens: int = 0  # of the memory alone, where the operation has that


def run_benchmark(operation: Operation, workload: Workload, settings: Settings, note: Note) -> list[Row]:
    """A row a variant that runs here. `note` is told what is done, and why variants are left out.

    Sets the number of torch's threads. RuntimeError where one of our variants is wrong.
    """
    torch.set_num_threads(settings.num_threads)
    names = [variant for variant in operation.variants if settings.with_others or variant.kind != "other"]
    calls, errors = check_variants(operation, names, workload, note)
    peaks: dict[str, int | None] = {}
    if settings.with_memory:
        note(f"memory of {len(calls)} variants ...")
        for name, call in calls.items():
            try:
                peaks[name] = _measure_peak(call, name, workload, settings.num_threads)
            except RuntimeError as error:
                note(_first_line(error))
    clock = make_clock(workload.device)
    for name, call in calls.items():  # once more: the first call of a variant was beside other memory
        if call.prepare is not None:
            call.prepare()
        milliseconds = clock(call.run)
        note(f"{name}: {milliseconds:.3g} ms")

    def on_round(number: int) -> None:
        if number % 5 == 0 or number == settings.num_samples:
            note(f"{number} of {settings.num_samples} rounds")

    times = measure(calls, clock, num_samples=settings.num_samples, max_seconds=settings.max_seconds, on_round=on_round)
    timings = {name: summarize(found) for name, found in times.items()}
    rows = [
        make_row(variant, workload, timings, peaks.get(variant.name), errors[variant.name])
        for variant in names
        if variant.name in calls
    ]
    on_cpu = workload.device.type == "cpu"
    if operation.measure_memory is not None and on_cpu and settings.with_memory and settings.memory_tokens:
        note(f"memory at {settings.memory_tokens} tokens ...")
        try:
            rows += operation.measure_memory(workload, settings.memory_tokens, settings.num_threads)
        except RuntimeError as error:
            note(_first_line(error))
    return rows


def check_variants(
    operation: Operation, variants: list[Variant], workload: Workload, note: Note
) -> tuple[dict[str, Call], dict[str, float | None]]:
    """The calls of the variants that run here, and their errors; None for roofs.

    RuntimeError where one of ours is wrong; another that is wrong, or raises, is left out with a note. Baselines stay.
    """
    note(f"{operation.name}: float64 results ...")
    inputs = operation.make_inputs(workload)
    exact = operation.compute_exact(inputs)
    calls: dict[str, Call] = {}
    errors: dict[str, float | None] = {}
    for variant in variants:
        try:
            with warnings.catch_warnings():
                if variant.kind == "other":
                    warnings.simplefilter("ignore")
                call, results = _make_and_run(variant, inputs)
        except (UnavailableError, ImportError) as error:
            note(f"skipped {variant.name}: {_first_line(error)}")
            continue
        except Exception as error:
            if variant.kind != "other":
                raise
            note(f"skipped {variant.name}: {type(error).__name__}: {_first_line(error)}")
            continue
        if variant.kind == "roof":
            calls[variant.name], errors[variant.name] = call, None
            continue
        relative = relative_error(results, exact)
        bound = ERROR_BOUNDS[torch.bfloat16 if variant.kind == "other" else workload.dtype]
        if math.isnan(relative) or relative > bound:
            text = f"{variant.name}: off by {relative:.1e} of the largest value, more than {bound:.0e}"
            if variant.kind == "ours":
                raise RuntimeError(text)
            note(text if variant.kind == "baseline" else f"skipped {text}")
            if variant.kind == "other":
                continue
        calls[variant.name], errors[variant.name] = call, largest_error(results, exact)
        del results
    return calls, errors


def make_row(
    variant: Variant, workload: Workload, timings: dict[str, Timing], peak: int | None, error: float | None
) -> Row:
    """The row of a variant that was timed."""
    timing = timings[variant.name]
    roof = None if variant.roof is None else timings[variant.roof].median_ms
    times = dataclasses.asdict(timing)
    del times["num_samples"]
    return Row(
        workload.operation,
        variant.name,
        workload.shape,
        str(workload.dtype).removeprefix("torch."),
        describe_device(workload.device),
        peak_bytes=peak,
        max_abs_err=error,
        ratio_to_roof=None if not roof else timing.median_ms / roof,
        **times,
    )


def describe_device(device: torch.device) -> str:
    """ "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _make_and_run(variant: Variant, inputs: Any) -> tuple[Call, Results]:
    call = variant.make(inputs)
    if call.prepare is not None:
        call.prepare()
    found = call.run()
    return call, found if isinstance(found, dict) else {}


def _measure_peak(call: Call, variant: str, workload: Workload, num_threads: int) -> int | None:
    if workload.device.type != "cuda":
        return peak_in_new_process(workload, variant, num_threads)
    if call.prepare is not None:
        call.prepare()
    return peak_on_cuda(call.run, workload.device)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
