"""An actor step, old log-probs and one update over the same samples: this project's packed policy beside padded loops.

Both sides start from one Hugging Face folder and use one loss, one mini-batch and as many threads. Each is first
compared with transformers in float64, a sample at a time without padding. The learning rate is 0, so that every step
does the same work.
"""

from __future__ import annotations

import gc
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
# Of the largest value of a parameter's gradient, and of a log-prob or the loss: beyond it a result is wrong. bfloat16
# has 8 bits.
MAX_GRAD_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.25}
MAX_VALUE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.25}
GRAD_FLOOR = 1e-6  # of the largest of all gradients: a parameter whose own are below is judged by it
DRIFT = 0.2  # standard deviation of the log-ratios that gradients are compared at: some tokens are clipped
TIMEOUT_S = 6 * 3600

Note = Callable[[str], None]


@dataclass(frozen=True)
class StepReport:
    """What the measuring process found, by variant."""

    problem: str | None = None  # a wrong result; then there are no times
    abs_errors: Mapping[str, float] = field(default_factory=dict)  # from float64: log-probs, loss and gradients
    # The worst parameter's: the largest difference over the largest value, from float64, and of ours from the padded
    grad_errors: Mapping[str, float] = field(default_factory=dict)
    ours_from_padded: float | None = None
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
    """Times of the plain padded loop and ours, and how far their gradients are apart."""
    ratio, bound, found = MIN_RATIO[workload.device.type], MAX_GRAD_ERROR[workload.dtype], report.ours_from_padded

    def error(rows: Rows) -> tuple[float, float] | None:
        return None if found is None else (found, found)

    return [
        Target(f"{PADDED} >= {ratio:g} x ours", ratio, time_ratio(PADDED, OURS), at_least=True),
        Target(f"gradients of both, largest relative difference <= {bound:g}", bound, error),
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
    drift = np.random.default_rng(1).normal(scale=DRIFT, size=len(logprobs))
    drifted = replace(batch, old_logprobs=(logprobs - drift).astype(np.float32))
    exact = _padded_results(oracle, batch, drifted)
    del oracle
    gc.collect()

    abs_errors, grad_errors, grads = {}, {}, {}
    max_value_error, max_grad_error = MAX_VALUE_ERROR[workload.dtype], MAX_GRAD_ERROR[workload.dtype]
    for name in (OURS, *loops):
        if name == OURS:
            found = _packed_results(policy, batch, drifted)
        else:
            found = _padded_results(loops[name], batch, drifted)
        abs_errors[name], grad_errors[name] = found.abs_error(exact), relative_error(found.grads, exact.grads)
        error = found.value_error(exact)
        text = f"{name}: log-probs and loss off by {error:.1e}, gradients by {grad_errors[name]:.1e} of the largest"
        _note(text)
        if not (error <= max_value_error and grad_errors[name] <= max_grad_error):  # or NaN
            return StepReport(f"{text}, more than {max_value_error:g} and {max_grad_error:g}")
        if name in (OURS, PADDED):
            grads[name] = found.grads
    difference = relative_error(grads[OURS], grads[PADDED])
    if not difference <= max_grad_error:
        return StepReport(f"{OURS}: gradients differ from those of {PADDED!r} by {difference:.1e} of the largest")
    num_positions = policy.plan(batch, range(batch.num_samples)).num_positions
    return StepReport(None, abs_errors, grad_errors, difference, num_positions)


@dataclass(frozen=True)
class _Results:
    logprobs: np.ndarray  # [R] in sample order
    loss: float
    grads: Mapping[str, torch.Tensor]  # by Hugging Face name

    def value_error(self, exact: _Results) -> float:
        """The largest difference of the log-probs and the loss; NaN if there is one."""
        return float(np.max([*np.abs(self.logprobs - exact.logprobs), abs(self.loss - exact.loss)]))

    def abs_error(self, exact: _Results) -> float:
        """The same, of gradients as well."""
        errors = [float((grad - exact.grads[name]).abs().max()) for name, grad in self.grads.items()]
        return float(np.max([self.value_error(exact), *errors]))


def _packed_results(policy: MegatronPolicy, batch: TrainingBatch, drifted: TrainingBatch) -> _Results:
    from fipo_megatron.trainer.layout_check import loss_and_gradients

    parts = policy.logprobs(batch)
    assert parts is not None, "one rank speaks for its tokens"
    loss, arrays = loss_and_gradients(policy, drifted, range(batch.num_samples))
    return _Results(merge_response_rows(parts), loss, {name: torch.from_numpy(a) for name, a in arrays.items()})


def _padded_results(loop: PaddedStep, batch: TrainingBatch, drifted: TrainingBatch) -> _Results:
    loss, grads = loop.gradients(drifted)
    return _Results(loop.logprobs(batch), loss, {name: grad.to("cpu", copy=True) for name, grad in grads.items()})


def relative_error(found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> float:
    """Of the worst parameter's gradient: the largest difference, over the largest value, or over GRAD_FLOOR of the
    largest of all parameters.

    Raises:
        ValueError: they are of different parameters.
    """
    if found.keys() != exact.keys():
        raise ValueError(f"gradients of {sorted(found.keys() ^ exact.keys())} are on one side alone")
    largest = {name: float(grad.abs().max()) for name, grad in exact.items()}
    floor = GRAD_FLOOR * max(largest.values())
    errors = [
        float((found[name].double() - grad.double()).abs().max()) / max(largest[name], floor)
        for name, grad in exact.items()
    ]
    return float(np.max(errors))  # NaN if there is one


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
