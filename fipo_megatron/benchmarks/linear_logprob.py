"""Log-probs from hidden states, beside bare products of as many FLOPs: one forward, and with the backward pass four."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from fipo_megatron.benchmarks import other_libraries
from fipo_megatron.benchmarks.logprob_passes import (
    BOTH,
    FORWARD,
    Forward,
    LogprobInputs,
    both_passes,
    eager_logprob,
    exact_logprob,
    make_tokens,
)
from fipo_megatron.benchmarks.memory import peak_in_new_process
from fipo_megatron.benchmarks.operation import Operation, Results, UnavailableError, Variant, Workload
from fipo_megatron.benchmarks.report import Row, Target, peak_ratio, time_ratio
from fipo_megatron.benchmarks.timing import Call
from fipo_megatron.ops.linear_logprob import linear_logprob

ROWS = 64  # of float64 logits at a time
ROOFS = ("1 bare GEMM", "4 bare GEMMs")
SCALE = 2.0  # standard deviation of the logits
LONG_TOKENS = 16384  # what the memory is computed for
MEMORY_VARIANTS = ("ours:torch", "eager")


def make_inputs(workload: Workload) -> LogprobInputs:
    """Random hidden states [N, H] and weights [V, H]."""
    num_tokens, vocab_size, hidden_size = workload.shape
    generator = torch.Generator(workload.device).manual_seed(0)
    hidden, weight = (
        torch.empty(rows, hidden_size, dtype=workload.dtype, device=workload.device)
        for rows in (num_tokens, vocab_size)
    )
    hidden.normal_(generator=generator)
    weight.normal_(0, SCALE * hidden_size**-0.5, generator=generator)
    return make_tokens({"hidden": hidden, "weight": weight}, num_tokens, vocab_size)


def compute_exact(inputs: LogprobInputs) -> Results:
    """float64 results of the textbook's form, by autograd."""
    hidden, weight = (inputs.leaves[name].detach().double() for name in ("hidden", "weight"))
    kinds = ("", "+entropy")
    grad_weights = [torch.zeros_like(weight) for _ in kinds]
    outputs: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(hidden), ROWS):
        rows = slice(start, start + ROWS)
        logprobs, entropy, *grads = exact_logprob(hidden[rows] @ weight.t(), inputs, rows)
        for total, grad in zip(grad_weights, grads, strict=True):
            total.addmm_(grad.t(), hidden[rows])
        outputs.append((logprobs, entropy, *(grad @ weight for grad in grads)))
    names = ("logprobs", "entropy", *(f"grad_hidden{kind}" for kind in kinds))
    exact = {name: torch.cat([part[i] for part in outputs]) for i, name in enumerate(names)}
    return exact | {f"grad_weight{kind}": total for kind, total in zip(kinds, grad_weights, strict=True)}


def make_products(inputs: LogprobInputs, number: int) -> Call:
    """1 product, logits; or 4: logits twice, as they are computed again, and both gradients. Into held memory."""
    hidden, weight = (inputs.leaves[name].detach() for name in ("hidden", "weight"))
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if number == 4:
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.t(), hidden, out=grad_weight)

    return Call(run)


def make_ours(inputs: LogprobInputs, impl: str, entropy: str) -> Forward:
    """linear_logprob with that implementation of its kernels; "triton" is for CUDA."""
    hidden, weight = inputs.leaves["hidden"], inputs.leaves["weight"]
    if impl == "triton" and not hidden.is_cuda:
        raise UnavailableError("needs CUDA")
    run = partial(
        linear_logprob, true_vocab_size=inputs.vocab_size, vocab_start=0, tp_group=None, entropy=entropy, impl=impl
    )
    return Forward(lambda: run(hidden, weight, inputs.target_ids))


def make_eager(inputs: LogprobInputs, with_entropy: bool) -> Forward:
    """All logits, a float32 log-softmax, and autograd."""
    hidden, weight = inputs.leaves["hidden"], inputs.leaves["weight"]
    return Forward(lambda: eager_logprob(hidden @ weight.t(), inputs.target_ids, with_entropy))


def measure_memory(workload: Workload, num_tokens: int, num_threads: int) -> list[Row]:
    """Peak memory of forward+backward of ours and of the eager path at `num_tokens`, and computed for LONG_TOKENS.

    Computed: the gradient of the weights stays as it is, all else of the peak is counted as proportional to the tokens;
    of ours that is too much, as its workspace is not.
    """
    _, vocab_size, hidden_size = workload.shape
    gradient = vocab_size * hidden_size * workload.dtype.itemsize
    measured = dataclasses.replace(workload, shape=(num_tokens, vocab_size, hidden_size))
    rows = []
    for name in MEMORY_VARIANTS:
        peak = peak_in_new_process(measured, f"{name} {BOTH}", num_threads)
        long_peak = None if peak is None else gradient + (peak - gradient) * LONG_TOKENS // num_tokens
        for tokens, found, text in ((num_tokens, peak, "memory"), (LONG_TOKENS, long_peak, "memory, computed")):
            row = Row(
                workload.operation,
                f"{name} {BOTH}: {text}",
                (tokens, vocab_size, hidden_size),
                str(workload.dtype).removeprefix("torch."),
                workload.device.type,
                peak_bytes=found,
            )
            rows.append(row)
    return rows


def choose_targets(workload: Workload) -> list[Target]:
    """Those of the device."""
    ours = "ours:triton" if workload.device.type == "cuda" else "ours:torch"
    forward, both = f"{ours} {FORWARD}", f"{ours} {BOTH}"
    if workload.device.type == "cpu":
        eager = f"eager {BOTH}: memory"
        return [
            Target("forward+backward <= 1.15 x the bare products", 1.15, time_ratio(both, ROOFS[1])),
            Target("memory of the head <= 1/10 of eager", 1 / 10, peak_ratio(f"{both}: memory", eager)),
            Target(
                f"the same, computed for {LONG_TOKENS} tokens, <= 1/20",
                1 / 20,
                peak_ratio(f"{both}: memory, computed", f"{eager}, computed"),
            ),
        ]
    verl_forward, verl_both = f"verl triton+entropy {FORWARD}", f"verl triton+entropy {BOTH}"
    with_entropy = f"{ours}+entropy"
    return [
        Target("forward <= 1.10 x the bare product", 1.10, time_ratio(forward, ROOFS[0])),
        Target("forward+backward <= 1.10 x the bare products", 1.10, time_ratio(both, ROOFS[1])),
        Target(
            "verl's forward >= 1.9 x ours", 1.9, time_ratio(verl_forward, f"{with_entropy} {FORWARD}"), at_least=True
        ),
        Target(
            "verl's forward+backward >= 1.5 x ours", 1.5, time_ratio(verl_both, f"{with_entropy} {BOTH}"), at_least=True
        ),
    ]


OPERATION = Operation(
    "linear_logprob",
    ("tokens", "vocab", "hidden"),
    {"cpu": (512, 151936, 256), "cuda": (8192, 152064, 5120)},
    (
        Variant(ROOFS[0], "roof", None, partial(make_products, number=1)),
        Variant(ROOFS[1], "roof", None, partial(make_products, number=4)),
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
            for name, make in other_libraries.FROM_HIDDEN.items()
            for variant in both_passes(name, "other", make, ROOFS)
        ),
    ),
    make_inputs,
    compute_exact,
    choose_targets,
    measure_memory,
)
