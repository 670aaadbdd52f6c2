"""Log-probs from logits, beside copies of as many bytes: a pass over the logits forward, two backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fipo_megatron.benchmarks import other_libraries
from fipo_megatron.benchmarks.logprob_passes import (
    BOTH,
    Forward,
    LogprobInputs,
    both_passes,
    eager_logprob,
    exact_logprob,
    make_tokens,
)
from fipo_megatron.benchmarks.operation import Operation, Results, UnavailableError, Variant, Workload
from fipo_megatron.benchmarks.report import Rows, Target, time_ratio
from fipo_megatron.benchmarks.timing import Call
from fipo_megatron.ops.token_logprob import token_logprob

ROWS = 64  # of float64 at a time
ROOFS = ("copy, 1 pass", "copy, 3 passes")
SCALE = 2.0  # standard deviation of the logits


def make_inputs(workload: Workload) -> LogprobInputs:
    """Random logits [N, V]."""
    num_tokens, vocab_size = workload.shape
    generator = torch.Generator(workload.device).manual_seed(0)
    logits = torch.empty(num_tokens, vocab_size, dtype=workload.dtype, device=workload.device)
    logits.normal_(0, SCALE, generator=generator)
    return make_tokens({"logits": logits}, num_tokens, vocab_size)


def compute_exact(inputs: LogprobInputs) -> Results:
    """float64 results of the textbook's form, by autograd."""
    logits = inputs.leaves["logits"].detach()
    cuts = [slice(start, start + ROWS) for start in range(0, len(logits), ROWS)]
    parts = [exact_logprob(logits[rows].double(), inputs, rows) for rows in cuts]
    names = ("logprobs", "entropy", "grad_logits", "grad_logits+entropy")
    return {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(names)}


def make_copy(inputs: LogprobInputs, passes: int) -> Call:
    """Reads and writes as many bytes as `passes` (1 or 3) passes over the logits."""
    logits = inputs.leaves["logits"].detach()
    half = len(logits) // 2
    target = torch.empty_like(logits)

    def run() -> None:
        target[:half].copy_(logits[half : 2 * half])
        if passes == 3:
            target.copy_(logits)

    return Call(run)


def make_ours(inputs: LogprobInputs, impl: str, entropy: str) -> Forward:
    """token_logprob with that implementation; "triton" is for CUDA."""
    logits = inputs.leaves["logits"]
    if impl == "triton" and not logits.is_cuda:
        raise UnavailableError("needs CUDA")
    run = partial(
        token_logprob, true_vocab_size=inputs.vocab_size, vocab_start=0, tp_group=None, entropy=entropy, impl=impl
    )
    return Forward(lambda: run(logits, inputs.target_ids))


def make_eager(inputs: LogprobInputs, with_entropy: bool) -> Forward:
    """Autograd over a float32 log-softmax."""
    return Forward(lambda: eager_logprob(inputs.leaves["logits"], inputs.target_ids, with_entropy))


def choose_targets(workload: Workload) -> list[Target]:
    """Those of the device."""
    num_tokens, vocab_size = workload.shape
    if workload.device.type == "cpu":
        ours, eager = f"ours:torch+entropy {BOTH}", f"eager+entropy {BOTH}"
        return [Target("forward+backward with entropy <= 0.5 x eager float32", 0.5, time_ratio(ours, eager))]
    ours = f"ours:triton {BOTH}"
    logit_bytes = num_tokens * vocab_size * workload.dtype.itemsize
    return [
        Target("forward+backward <= 1.25 x the copy of 3 passes", 1.25, time_ratio(ours, ROOFS[1])),
        Target("Megatron's fused >= 7 x ours", 7, time_ratio(f"megatron fused {BOTH}", ours), at_least=True),
        Target("Liger vocab-parallel >= 3 x ours", 3, time_ratio(f"liger vocab-parallel {BOTH}", ours), at_least=True),
        Target("bytes a token beside logits and gradient <= 64", 64, _extra_bytes(ours, num_tokens, logit_bytes)),
    ]


def _extra_bytes(variant: str, num_tokens: int, gradient_bytes: int) -> Callable[[Rows], tuple[float, float] | None]:
    def figures(rows: Rows) -> tuple[float, float] | None:
        row = rows.get(variant)
        if row is None or row.peak_bytes is None:
            return None
        extra = (row.peak_bytes - gradient_bytes) / num_tokens
        return extra, extra

    return figures


OPERATION = Operation(
    "token_logprob",
    ("tokens", "vocab"),
    {"cpu": (512, 151936), "cuda": (8192, 152064)},
    (
        Variant(ROOFS[0], "roof", None, partial(make_copy, passes=1)),
        Variant(ROOFS[1], "roof", None, partial(make_copy, passes=3)),
        *(
            variant
            for impl in ("torch", "triton")
            for suffix, entropy in (("", "none"), ("+entropy", "differentiable"))
            for variant in both_passes(
                f"ours:{impl}{suffix}", "ours", partial(make_ours, impl=impl, entropy=entropy), ROOFS
            )
        ),
        *both_passes("eager", "baseline", partial(make_eager, with_entropy=False), ROOFS),
        *both_passes("eager+entropy", "baseline", partial(make_eager, with_entropy=True), ROOFS),
        *(
            variant
            for name, make in other_libraries.FROM_LOGITS.items()
            for variant in both_passes(name, "other", make, ROOFS)
        ),
    ),
    make_inputs,
    compute_exact,
    choose_targets,
)
