"""An actor step, old log-probs and one update over the same samples: this project's packed policy beside padded loops.

Both sides start from one Hugging Face folder and use one loss, one mini-batch and as many threads. Each is first
compared with transformers in float64, a sample at a time without padding; in 16 bits none may be much farther from it
than the plain padded loop is. The learning rate is 0, so that every step does the same work.
"""

from __future__ import annotations

import gc
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fipo_megatron.benchmarks.comparison import describe_device
from fipo_megatron.benchmarks.memory import peak_of_process, peak_on_cuda
from fipo_megatron.benchmarks.padded_step import PaddedSettings, PaddedStep
from fipo_megatron.benchmarks.report import Row, Rows, Target, time_ratio
from fipo_megatron.benchmarks.step_errors import (
    MAX_ERROR,
    MAX_RATIO,
    Errors,
    StepResults,
    describe,
    exact_limits,
    gradient_errors,
    rounded_limits,
    share_of_limits,
)
from fipo_megatron.benchmarks.step_workload import OURS, PADDED, StepWorkload, make_batch, write_model
from fipo_megatron.benchmarks.timing import Call, make_clock, measure, summarize
from fipo_megatron.model.platform import Platform
from fipo_megatron.parallel.packed import merge_response_rows
from fipo_megatron.parallel.plan import microbatch_tokens
from fipo_megatron.types import TrainingBatch

if TYPE_CHECKING:
    from fipo_megatron.trainer.policy import MegatronPolicy
    from fipo_megatron.trainer.policy_processes import Call as PolicyCall

NAME = "step"
ROOF = "bare GEMMs"
MIN_RATIO = {"cpu": 2.0, "cuda": 3.0}  # of the padded loop's time and ours
DRIFTS, DRIFT_FRACS, DRIFT_SPREAD = (-0.6, 0.0, 0.6), (0.15, 0.7, 0.15), 0.05  # the clip is at -0.22 and 0.25
TIMEOUT_S = 6 * 3600

Note = Callable[[str], None]


@dataclass(frozen=True)
class StepReport:
    """What the measuring process found, by variant."""

    problem: str | None = None  # a wrong result; then there are no times
    abs_errors: Mapping[str, float] = field(default_factory=dict)  # from float64: log-probs, loss and gradients
    errors: Mapping[str, Errors] = field(default_factory=dict)  # from float64
    # Ours beside the plain padded loop. float32: the largest difference of the worst parameter's gradient over its
    # largest value; 16 bits: the largest of the errors' ratios.
    ours_by_padded: float | None = None
    num_positions: int = 0  # of the policy's own plan
    times: Mapping[str, list[float]] = field(default_factory=dict)  # ms
    peaks: Mapping[str, int | None] = field(default_factory=dict)  # bytes beside weights, gradients, optimizer state


def run(workload: StepWorkload, note: Note) -> tuple[list[Row], StepReport]:
    """A row a variant, and what they are from. The steps run in a process of their own.

    Raises:
        RuntimeError: a result of ours or of a padded loop is wrong, or the process failed.
    """
    from fipo_megatron.trainer.policy_processes import run_policy

    with tempfile.TemporaryDirectory(prefix="fipo-step-") as place:
        folder = Path(place) / "model"
        note("writing the model ...")
        write_model(workload, folder)
        config = workload.config(folder)
        load: list[PolicyCall] = [(prepare, (workload.num_threads,)), ("load", (folder, config.optimizer))]
        *_, [report] = run_policy(config, [*load, (measure_steps, (workload,))], TIMEOUT_S)
        if report.problem is not None:
            raise RuntimeError(report.problem)
        if workload.with_memory and workload.device.type == "cpu":
            note(f"memory of {len(workload.padded) + 1} variants ...")
            for name in (OURS, *workload.padded):
                *_, [peak] = run_policy(config, [*load, (measure_peak, (workload, name))], TIMEOUT_S)
                report = replace(report, peaks={**report.peaks, name: peak})
    return [make_row(workload, report, name) for name in report.times], report


def make_row(workload: StepWorkload, report: StepReport, name: str) -> Row:
    """The row of a variant."""
    times = asdict(summarize(report.times[name]))
    del times["num_samples"]
    roof = summarize(report.times[ROOF]).median_ms
    return Row(
        NAME,
        name,
        workload.shape,
        str(workload.dtype).removeprefix("torch."),
        describe_device(workload.device),
        peak_bytes=report.peaks.get(name),
        max_abs_err=report.abs_errors.get(name),
        ratio_to_roof=None if name == ROOF else times["median_ms"] / roof,
        **times,
    )


def targets(workload: StepWorkload, report: StepReport) -> list[Target]:
    """Times of the plain padded loop and ours, and how far their results are apart."""
    ratio, found = MIN_RATIO[workload.device.type], report.ours_by_padded
    if workload.dtype == torch.float32:
        text, bound = f"gradients of both, largest relative difference <= {MAX_ERROR:g}", MAX_ERROR
    else:
        text, bound = f"errors of ours, of log-probs and gradients, <= {MAX_RATIO:g} x those of {PADDED}", MAX_RATIO

    def error(rows: Rows) -> tuple[float, float] | None:
        return None if found is None else (found, found)

    return [
        Target(f"{PADDED} >= {ratio:g} x ours", ratio, time_ratio(PADDED, OURS), at_least=True),
        Target(text, bound, error),
    ]


# ---------------------------------------------------------------- in the measuring process


class MeasuredPlatform(Platform):
    """One on which the policy leaves the peak of memory to who measures a whole step from outside."""

    def reset_peak_memory(self) -> None:
        """Nothing."""


def prepare(policy: MegatronPolicy, num_threads: int) -> None:
    """Before the policy's load: also no bars of transformers, nor Megatron's warnings of kernels that are not here."""
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(num_threads)
    policy.platform = MeasuredPlatform(policy.platform.name)


def measure_steps(policy: MegatronPolicy, workload: StepWorkload) -> StepReport:
    """Check every variant, then time all in turns."""
    batch = make_batch(workload)
    plain = _load_padded(policy, workload.padded[PADDED], workload.dtype)
    loops = {name: plain.share(settings) for name, settings in workload.padded.items()}
    report = check_steps(policy, workload, batch, loops)
    if report.problem is not None:
        return report
    calls = {OURS: Call(partial(packed_step, policy, batch))}
    calls |= {name: Call(partial(padded_step, loop, batch)) for name, loop in loops.items()}
    peaks: dict[str, int | None] = {}
    for name, call in calls.items():
        call.run()  # for the first time: the optimizer's state is made
        if workload.with_memory and workload.device.type == "cuda":
            peaks[name] = peak_on_cuda(call.run, workload.device)
    calls[ROOF] = make_products(workload)
    _note("times ...")

    def on_round(number: int) -> None:
        if number % 5 == 0 or number == workload.num_samples:
            _note(f"{number} of {workload.num_samples} rounds")

    times = measure(
        calls,
        make_clock(workload.device),
        num_samples=workload.num_samples,
        max_seconds=workload.max_seconds,
        on_round=on_round,
    )
    return replace(report, times=times, peaks=peaks)


def measure_peak(policy: MegatronPolicy, workload: StepWorkload, name: str) -> int | None:
    """Bytes by which this process grows in a variant's second step on a CPU."""
    batch = make_batch(workload)
    if name == OURS:
        run_step = partial(packed_step, policy, batch)
    else:
        run_step = partial(padded_step, _load_padded(policy, workload.padded[name], workload.dtype), batch)
    run_step()
    return peak_of_process(run_step)


def packed_step(policy: MegatronPolicy, batch: TrainingBatch) -> None:
    """The trainer's: old log-probs of the batch, and one update over all of it."""
    parts = policy.logprobs(batch)
    assert parts is not None, "one rank speaks for its tokens"
    policy.update(replace(batch, old_logprobs=merge_response_rows(parts)), range(batch.num_samples), lr=0.0)


def padded_step(loop: PaddedStep, batch: TrainingBatch) -> None:
    """The same by a padded loop."""
    loop.update(replace(batch, old_logprobs=loop.logprobs(batch)), lr=0.0)


def check_steps(
    policy: MegatronPolicy, workload: StepWorkload, batch: TrainingBatch, loops: Mapping[str, PaddedStep]
) -> StepReport:
    """How far log-probs, loss and gradients of every variant are from those of transformers in float64."""
    _note("float64 results ...")
    oracle = _load_padded(policy, PaddedSettings(rows=1), torch.float64)
    logprobs = oracle.logprobs(batch)
    drifted = replace(batch, old_logprobs=(logprobs - draw_drifts(len(logprobs))).astype(np.float32))
    exact = _padded_results(oracle, batch, drifted)
    del oracle
    gc.collect()

    plain, order, limits = _padded_results(loops[PADDED], batch, drifted), math.inf, exact_limits()
    if workload.dtype != torch.float32:
        # What the type rounds is no mistake. How much that is the plain loop tells, which in float32 makes none.
        in_float32 = _load_padded(policy, workload.padded[PADDED], torch.float32)
        errors = _padded_results(in_float32, batch, drifted).errors(exact, order)
        del in_float32
        gc.collect()
        if not share_of_limits(errors, limits) <= 1:
            return StepReport(f"{PADDED} in float32: {describe(errors)}; none may be above {MAX_ERROR:g}")
        order = 2.0
        limits = rounded_limits(plain.errors(exact, order), workload.dtype)
    found = {PADDED: plain}
    abs_errors, all_errors = {}, {}
    for name in (PADDED, OURS, *(other for other in loops if other != PADDED)):
        if name == OURS:
            found[name] = _packed_results(policy, batch, drifted)
        results = found[name] if name in found else _padded_results(loops[name], batch, drifted)
        errors = results.errors(exact, order)
        abs_errors[name], all_errors[name] = results.abs_error(exact), errors
        _note(f"{name}: {describe(errors)}")
        if not share_of_limits(errors, limits) <= 1:  # or NaN
            most = ", ".join(f"{limit:.1e}" for limit in limits)
            return StepReport(f"{name}: {describe(errors)}; the most that may be is {most}")
    _, difference = gradient_errors(found[OURS].grads, found[PADDED].grads)
    if workload.dtype == torch.float32 and not difference <= MAX_ERROR:
        return StepReport(f"{OURS}: gradients differ from those of {PADDED!r} by {difference:.1e} of the largest")
    return StepReport(
        None,
        abs_errors,
        all_errors,
        difference if workload.dtype == torch.float32 else MAX_RATIO * share_of_limits(all_errors[OURS], limits),
        policy.plan(batch, range(batch.num_samples)).num_positions,
    )


def draw_drifts(num_tokens: int) -> np.ndarray:
    """Log-ratios that gradients are compared at, [num_tokens]: some tokens are clipped, and no token is so near the
    clip's bounds that rounding decides on which side it is, where its gradient would be there or not."""
    rng = np.random.default_rng(1)
    return rng.choice(DRIFTS, num_tokens, p=DRIFT_FRACS) + rng.uniform(-DRIFT_SPREAD, DRIFT_SPREAD, num_tokens)


def _packed_results(policy: MegatronPolicy, batch: TrainingBatch, drifted: TrainingBatch) -> StepResults:
    from fipo_megatron.trainer.layout_check import loss_and_gradients

    parts = policy.logprobs(batch)
    assert parts is not None, "one rank speaks for its tokens"
    loss, arrays = loss_and_gradients(policy, drifted, range(batch.num_samples))
    return StepResults(merge_response_rows(parts), loss, {name: torch.from_numpy(a) for name, a in arrays.items()})


def _padded_results(loop: PaddedStep, batch: TrainingBatch, drifted: TrainingBatch) -> StepResults:
    loss, grads = loop.gradients(drifted)
    return StepResults(loop.logprobs(batch), loss, {name: grad.to("cpu", copy=True) for name, grad in grads.items()})


def make_products(workload: StepWorkload) -> Call:
    """The matrix products alone of the tokens that there are, those of a packed micro-batch at a time, into held
    memory: each layer's and the head's forward for the log-probs and for the update, and both gradients. Attention is
    left out.
    """
    vocab, hidden, intermediate, layers, heads, key_value_heads = workload.shape
    num_positions = int(workload.lengths.sequence.sum()) - len(workload.lengths)
    num_responses = int(workload.lengths.response.sum())
    block = microbatch_tokens(workload.config(Path("unread")))
    head_dim = hidden // heads
    kinds = [  # (rows in all, width in, width out, times)
        (num_positions, hidden, (heads + 2 * key_value_heads) * head_dim, layers),
        (num_positions, heads * head_dim, hidden, layers),
        (num_positions, hidden, 2 * intermediate, layers),
        (num_positions, intermediate, hidden, layers),
        (num_responses, hidden, vocab, 1),
    ]

    def make(*size: int) -> torch.Tensor:
        return torch.ones(size, dtype=workload.dtype, device=workload.device)

    held = []
    for rows, width_in, width_out, times in kinds:
        most = min(block, rows)
        values, grads, outputs = make(most, width_in), make(most, width_in), make(most, width_out)
        held.append((rows, times, values, grads, outputs, make(width_out, width_in), make(width_out, width_in)))

    def run() -> None:
        for rows, times, values, grads, outputs, weight, grad_weight in held:
            for _ in range(times):
                for start in range(0, rows, len(values)):
                    n = min(len(values), rows - start)
                    torch.mm(values[:n], weight.t(), out=outputs[:n])
                    torch.mm(values[:n], weight.t(), out=outputs[:n])
                    torch.mm(outputs[:n], weight, out=grads[:n])
                    torch.mm(outputs[:n].t(), values[:n], out=grad_weight)

    return Call(run)


def _load_padded(policy: MegatronPolicy, settings: PaddedSettings, dtype: torch.dtype) -> PaddedStep:
    config = policy.config
    return PaddedStep(policy.folder, settings, config.algorithm, config.optimizer, dtype, policy.platform.device)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
