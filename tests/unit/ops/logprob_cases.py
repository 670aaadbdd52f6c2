"""Inputs and bounds of the comparisons of log-prob kernels with float64."""

from __future__ import annotations

import torch

from tests.unit.ops.pairwise import Case, pairwise_cover

# The longest comparisons: 127 rows of a vocabulary of 50,257, 3 of the longer ones.
MAX_ELEMENTS = 6_500_000
MAX_WEIGHTS = 9_000_000
FACTORS = {
    "vocab": (7, 1000, 1024, 32000, 50257, 151936, 152064, 262144),
    "rows": (0, 1, 3, 127, 1024),
    "dtype": (torch.float16, torch.bfloat16, torch.float32),
    "peaked": (False, True),
    "temperature": (0.5, 1.0, 1.7),
    "padding": (0, 300),
    "entropy": ("none", "detached", "differentiable"),
}


def make_cases(**more: tuple) -> list[Case]:
    """A pairwise cover of FACTORS and `more`; long rows meet few of them."""
    cases, _ = pairwise_cover(
        FACTORS | more,
        lambda case: (
            case.get("vocab", 0) * case.get("rows", 0) <= MAX_ELEMENTS
            and case.get("vocab", 0) * case.get("hidden", 0) <= MAX_WEIGHTS
        ),
    )
    return cases


def name_case(case: Case) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def make_targets(case: Case, generator: torch.Generator) -> torch.Tensor:
    """First and last id of the vocabulary among them."""
    targets = torch.randint(0, case["vocab"], (case["rows"],), generator=generator)
    targets[:2] = torch.tensor([case["vocab"] - 1, 0])[: len(targets[:2])]
    return targets


def loss_weights(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of log-probs and entropies; of either sign, and 0 for some."""
    steps = torch.arange(rows, dtype=torch.float64)
    return (steps * 0.7).sin() * (steps % 5 != 4), (steps * 1.3).cos()


def weighted_sum(logprobs: torch.Tensor, entropy: torch.Tensor | None, differentiable: bool) -> torch.Tensor:
    a, b = loss_weights(len(logprobs))
    total = (a.to(logprobs) * logprobs).sum()
    if differentiable:
        assert entropy is not None
        total = total + (b.to(entropy) * entropy).sum()
    return total


def assert_near(found: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    """Off by at most `bound`, and by the rounding of `found` to its own type."""
    info = torch.finfo(found.dtype)
    allowed = bound + exact.abs() * info.eps * 0.51 + info.smallest_normal * info.eps
    excess = (found.double() - exact).abs() - allowed
    assert found.shape == exact.shape
    assert not excess.numel() or excess.max().item() <= 0, f"off by {(found.double() - exact).abs().max():.3g}"
