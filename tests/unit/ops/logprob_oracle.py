"""Log-probs, entropy and gradients in float64 by their formulas, a block of rows at a time, and errors against them.

Autograd over the reference keeps several tensors of the size of the logits: 2 GiB each at 1024 rows of 262,144 columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tests.unit.ops.logprob_cases import loss_weights
from tests.unit.ops.pairwise import Case

BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class ExactRows:
    """Of a block of rows. `grad_logits` is that of logprob_cases.weighted_sum, for the columns that count."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    grad_logits: torch.Tensor


@dataclass
class Errors:
    """The worst of what was compared, by its name."""

    absolute: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    of_allowed: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def compare(self, name: str, found: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
        """Adds to the record what assert_near measures."""
        worst, share = assert_near(found, exact, bound)
        self.absolute[name] = max(self.absolute[name], worst)
        self.of_allowed[name] = max(self.of_allowed[name], share)

    def __str__(self) -> str:
        return ", ".join(f"{name} {self.absolute[name]:.2g} ({self.of_allowed[name]:.2f})" for name in self.absolute)


def row_blocks(case: Case) -> Iterator[slice]:
    size = max(BLOCK_ELEMENTS // case["vocab"], 1)
    return (slice(start, min(start + size, case["rows"])) for start in range(0, case["rows"], size))


def exact_rows(logits: torch.Tensor, targets: torch.Tensor, rows: slice, case: Case) -> ExactRows:
    """Of the float64 `logits` of these rows, without padded columns; they are lost. `targets` are those of all rows."""
    assert logits.dtype == torch.float64
    a, b = (weights[rows, None] for weights in loss_weights(case["rows"]))
    columns = targets[rows, None]
    log_p = logits.div_(case["temperature"])
    log_p.sub_(log_p.amax(1, keepdim=True))
    p = log_p.exp()
    total = p.sum(1, keepdim=True)
    p.div_(total)
    log_p.sub_(total.log_())
    logprobs = log_p.gather(1, columns)[:, 0]
    entropy = -torch.bmm(p[:, None], log_p[:, :, None]).view(-1, 1)
    if case["entropy"] == "differentiable":
        grad = log_p.add_(entropy).mul_(b).add_(a).mul_(p)
    else:
        grad = p.mul_(a)
    grad.div_(-case["temperature"]).scatter_add_(1, columns, a / case["temperature"])
    return ExactRows(logprobs, entropy[:, 0], grad)


def assert_near(found: torch.Tensor, exact: torch.Tensor, bound: float) -> tuple[float, float]:
    """Off by at most `bound`, and by the rounding of `found` to its own type. (largest error, its share of these)."""
    info = torch.finfo(found.dtype)
    assert found.shape == exact.shape
    if not exact.numel():
        return 0.0, 0.0
    error = found.to(torch.float64, copy=True).sub_(exact).abs_()
    worst = error.max().item()
    allowed = exact.abs().mul_(info.eps * 0.51).add_(bound + info.smallest_normal * info.eps)
    share = error.div_(allowed).max().item()
    assert share <= 1, f"off by {worst:.3g}, at most {share:.3g} times what is allowed"
    return worst, share
