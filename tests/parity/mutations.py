"""Mistakes that real projects have shipped, to be made on purpose in every rank of a policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

# (mutation, layout in which it matters, aggregation)
CASES = [
    ("mean_of_means", "tp1", "token-mean"),
    ("context_scaled_twice", "cp2", "token-mean"),
    ("context_averaged", "cp2", "token-mean"),
    ("sequences_counted_by_every_rank", "cp2", "seq-mean-token-mean"),
    ("carry_across_a_packed_boundary", "tp1", "token-mean"),
    ("logprobs_shifted_by_one", "tp1", "token-mean"),
    ("drop_counted_per_rank", "cp2", "token-mean"),
]
# By how much a gradient that is right but for its scale is wrong: nothing else may be.
GRAD_ERRORS = {"context_scaled_twice": 1.0, "context_averaged": 0.5, "sequences_counted_by_every_rank": 0.5}
# The statistics, and so the loss that is shown, are of before the mistake.
LOSS_IS_RIGHT = ("mean_of_means", "context_scaled_twice", "context_averaged")


def apply(policy: Any, mutation: str) -> None:
    """Make the mistake in this process."""
    globals()[f"_{mutation}"]()


def _wrap_loss(change: Any) -> None:
    from fipo_megatron.trainer import step

    original = step.policy_loss
    step.policy_loss = lambda *args, groups, **kwargs: change(original(*args, groups=groups, **kwargs), groups)


def _mean_of_means() -> None:
    """Each microbatch divides by its own tokens, and the microbatches are averaged."""
    _wrap_loss(
        lambda output, _: replace(
            output,
            loss_sum=output.loss_sum / output.denominator.clamp(min=1),
            denominator=torch.ones_like(output.denominator),
        )
    )


def _context_scaled_twice() -> None:
    _wrap_loss(lambda output, groups: replace(output, loss_sum=output.loss_sum * groups.context.size()))


def _context_averaged() -> None:
    _wrap_loss(lambda output, groups: replace(output, loss_sum=output.loss_sum / groups.context.size()))


def _sequences_counted_by_every_rank() -> None:
    from fipo_megatron.algorithm import reduction

    reduction.counts_sequences = lambda context_group: True


def _carry_across_a_packed_boundary() -> None:
    from fipo_megatron.algorithm import fipo_loss
    from fipo_megatron.types import SegmentTable

    original = fipo_loss.future_kl

    def one_segment(log_ratios: torch.Tensor, mask: Any, config: Any, _: Any, *args: Any) -> torch.Tensor:
        return original(log_ratios, mask, config, SegmentTable(torch.tensor([0, len(log_ratios)])), *args)

    fipo_loss.future_kl = one_segment


def _logprobs_shifted_by_one() -> None:
    from fipo_megatron.trainer import step

    original = step.linear_logprob
    step.linear_logprob = lambda hidden, weight, targets, **kwargs: original(hidden, weight, targets.roll(1), **kwargs)


def _drop_counted_per_rank() -> None:
    from fipo_megatron.algorithm import fipo_loss

    original = fipo_loss._find_kept
    fipo_loss._find_kept = lambda mask, clipped, segments, config, group: original(
        mask, clipped, segments, config, None
    )
