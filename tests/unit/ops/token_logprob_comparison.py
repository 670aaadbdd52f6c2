"""token_logprob, on whole rows and on vocabulary shards, against float64."""

from __future__ import annotations

import torch

from fipo_megatron.ops.token_logprob import token_logprob
from fipo_megatron.ops.token_logprob.row_kernels import merge_blocks
from fipo_megatron.ops.token_logprob.torch_impl import TorchRowKernels
from fipo_megatron.ops.token_logprob.vocab_parallel import VocabShard, merge_shards
from tests.unit.ops.logprob_cases import loss_weights, make_targets, padded_width, weighted_sum
from tests.unit.ops.logprob_oracle import Errors, exact_rows, row_blocks
from tests.unit.ops.pairwise import Case


def make_logits(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with a large number in each padded column, and targets."""
    generator = torch.Generator().manual_seed(case["vocab"] + case["rows"])
    width = padded_width(case)
    targets = make_targets(case, generator)
    logits = torch.randn(case["rows"], width, generator=generator).mul_(3)
    if case["peaked"]:
        logits[:, 0] += 40
        logits[torch.arange(case["rows"])[::2], targets[::2]] += 60
    logits[:, case["vocab"] :] = 1e4
    logits = logits.to(case["dtype"])
    if case["layout"] == "row_stride":
        logits = torch.cat([logits, torch.full((case["rows"], 3), torch.nan).to(logits)], dim=1)[:, :width]
    elif case["layout"] == "transposed":
        logits = logits.t().contiguous().t()
    return logits, targets


def run_shards(
    logits: torch.Tensor, targets: torch.Tensor, case: Case
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probs, entropy and gradient by the kernels on each shard, merged in this process."""
    kernels, width = TorchRowKernels(), logits.size(1) // case["shards"]
    firsts = [width * i for i in range(case["shards"])]
    counted = [min(max(case["vocab"] - first, 0), width) for first in firsts]
    shards = [logits[:, first : first + width] for first in firsts]
    if case["layout"] == "transposed":
        shards = [shard.contiguous() for shard in shards]
    common = {"temperature": case["temperature"]}
    statistics = [
        kernels.row_statistics(
            shard, targets, first_column=first, num_columns=columns, with_entropy=case["entropy"] != "none", **common
        )
        for shard, first, columns in zip(shards, firsts, counted, strict=True)
    ]
    merged = merge_blocks(statistics, firsts, counted, targets)
    whole = VocabShard(kernels, case["temperature"], 0, case["vocab"], None, case["entropy"])
    results = merge_shards(merged, targets, whole)
    a, b = (weights.to(results.logprobs) for weights in loss_weights(case["rows"]))
    gradient = torch.full(logits.shape, torch.nan, dtype=logits.dtype)
    has_gradient = case["entropy"] == "differentiable"
    for shard, first, columns in zip(shards, firsts, counted, strict=True):
        kernels.write_logit_gradient(
            shard,
            gradient[:, first : first + width],
            targets,
            results.log_normalizer,
            a,
            entropy=results.entropy if has_gradient else None,
            grad_entropy=b if has_gradient else None,
            first_column=first,
            num_columns=columns,
            **common,
        )
    return results.logprobs, results.entropy, gradient


def compare_token_logprob(case: Case) -> Errors:
    """The worst errors of log-probs, entropy and gradient; AssertionError beyond what float32 explains."""
    logits, targets = make_logits(case)
    vocab, temperature = case["vocab"], case["temperature"]
    if case["shards"] == 1:
        logits.requires_grad_()
        logprobs, entropy = token_logprob(
            logits,
            targets,
            temperature=temperature,
            true_vocab_size=vocab,
            vocab_start=0,
            tp_group=None,
            entropy=case["entropy"],
        )
        (grad,) = torch.autograd.grad(weighted_sum(logprobs, entropy, case["entropy"] == "differentiable"), logits)
        logits, logprobs = logits.detach(), logprobs.detach()
        entropy = None if entropy is None else entropy.detach()
    else:
        logprobs, entropy, grad = run_shards(logits, targets, case)

    assert logprobs.dtype == torch.float32
    assert logprobs.shape == targets.shape
    assert grad.dtype == case["dtype"]
    assert grad.shape == logits.shape
    assert (logprobs <= 0).all()
    assert (grad[:, vocab:] == 0).all()
    assert (entropy is None) == (case["entropy"] == "none")
    errors = Errors()
    # float32 resolves exponents of 100 to 8e-6, what is near 0 much better
    largest = 120 / temperature if case["peaked"] else 20 / temperature
    for rows in row_blocks(case):
        exact = exact_rows(logits[rows, :vocab].double(), targets, rows, case)
        errors.compare("log-prob", logprobs[rows], exact.logprobs, 2e-7 * largest)
        errors.compare("gradient", grad[rows, :vocab], exact.grad_logits, 4e-7 * largest)
        if entropy is not None:
            errors.compare("entropy", entropy[rows], exact.entropy, 3e-7 * largest)
    return errors
