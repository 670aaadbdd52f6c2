"""Log-probs with and without their gradients: what the two log-prob benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fipo_megatron.benchmarks.operation import Kind, Results, Variant
from fipo_megatron.benchmarks.timing import Call

FORWARD, BOTH = "fwd", "f+b"  # how the names of variants end

# log-probs [N] and entropies [N], or None where a variant has none
Outputs = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class LogprobInputs:
    """Tokens with a vocabulary of `vocab_size`, and what the gradient is taken of: sum(a * logprobs + b * entropy).

    `leaves` are the logits [N, V], or hidden states [N, H] and weights [V, H]; all of a gradient.
    """

    leaves: Mapping[str, torch.Tensor]
    target_ids: torch.Tensor  # int64 [N]
    logprob_weights: torch.Tensor  # float32 [N], "a"
    entropy_weights: torch.Tensor  # float32 [N], "b"
    vocab_size: int


@dataclass(frozen=True)
class Forward:
    """How a variant gets from the inputs to its outputs; `leaves` where it takes others than the inputs'."""

    run: Callable[[], Outputs]
    leaves: Mapping[str, torch.Tensor] | None = None
    prepare: Callable[[], None] | None = None


def make_tokens(leaves: Mapping[str, torch.Tensor], num_tokens: int, vocab_size: int) -> LogprobInputs:
    """Inputs with random targets and weights of either sign, the same each time."""
    device = next(iter(leaves.values())).device
    generator = torch.Generator(device).manual_seed(1)
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator, device=device)
    weights = torch.randn(2, num_tokens, generator=generator, device=device)
    return LogprobInputs(
        {name: leaf.requires_grad_() for name, leaf in leaves.items()}, targets, weights[0], weights[1], vocab_size
    )


def both_passes(
    name: str, kind: Kind, make: Callable[[LogprobInputs], Forward], roofs: tuple[str, str]
) -> tuple[Variant, Variant]:
    """The variants `name` forward without gradient, as for old log-probs, and forward and backward."""

    def make_forward(inputs: LogprobInputs) -> Call:
        forward = make(inputs)

        def run() -> Results:
            with torch.no_grad():
                return _name_outputs(*forward.run())

        return Call(run, forward.prepare)

    def make_both(inputs: LogprobInputs) -> Call:
        forward = make(inputs)
        leaves = inputs.leaves if forward.leaves is None else forward.leaves

        def run() -> Results:
            logprobs, entropy = forward.run()
            outputs, weights = [logprobs], [inputs.logprob_weights.to(logprobs.dtype)]
            if entropy is not None:
                outputs.append(entropy)
                weights.append(inputs.entropy_weights.to(entropy.dtype))
            grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
            suffix = "" if entropy is None else "+entropy"
            named = {
                f"grad_{leaf}{suffix}": grad.view_as(inputs.leaves[leaf])
                for leaf, grad in zip(leaves, grads, strict=True)
            }
            return _name_outputs(logprobs.detach(), None if entropy is None else entropy.detach()) | named

        return Call(run, forward.prepare)

    return (
        Variant(f"{name} {FORWARD}", kind, roofs[0], make_forward),
        Variant(f"{name} {BOTH}", kind, roofs[1], make_both),
    )


def _name_outputs(logprobs: torch.Tensor, entropy: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {"logprobs": logprobs} if entropy is None else {"logprobs": logprobs, "entropy": entropy}


def eager_logprob(logits: torch.Tensor, target_ids: torch.Tensor, with_entropy: bool) -> Outputs:
    """What a trainer without kernels writes: float32 log-softmax, gather, and the entropy from the same."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    logprobs = log_probs.gather(-1, target_ids[:, None]).squeeze(-1)
    return logprobs, -(log_probs.exp() * log_probs).sum(-1) if with_entropy else None


def exact_logprob(
    logits: torch.Tensor, inputs: LogprobInputs, rows: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of float64 `logits` of some rows: log-probs, entropies, and the logits' gradient without and with the entropy."""
    logits = logits.detach().requires_grad_()
    log_probs = torch.log_softmax(logits, dim=-1)
    logprobs = log_probs.gather(1, inputs.target_ids[rows, None]).squeeze(1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    (grad,) = torch.autograd.grad(logprobs, logits, inputs.logprob_weights[rows].double(), retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy, logits, inputs.entropy_weights[rows].double())
    return logprobs.detach(), entropy.detach(), grad, grad + of_entropy
