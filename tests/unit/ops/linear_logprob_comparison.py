"""linear_logprob, on a whole head and on its vocabulary shards, against float64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import torch.distributed as dist

from fipo_megatron.ops.linear_logprob import linear_logprob
from tests.unit.ops.logprob_cases import make_targets, padded_width, weighted_sum
from tests.unit.ops.logprob_oracle import Errors, exact_rows, row_blocks
from tests.unit.ops.pairwise import Case

COLLECTIVE_TIMEOUT_S = 120


def make_head(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head whose padded rows are large, and targets."""
    generator = torch.Generator().manual_seed(case["vocab"] + case["rows"])
    targets = make_targets(case, generator)
    hidden = torch.randn(case["rows"], case["hidden"], generator=generator)
    weight = 0.3 * torch.randn(padded_width(case), case["hidden"], generator=generator)
    if case["peaked"]:
        hidden[::2] += 2 * weight[targets[::2]]
        hidden *= 3
    weight[case["vocab"] :] = 50.0
    hidden, weight = hidden.to(case["dtype"]), weight.to(case["dtype"])
    if case["layout"] == "strided":
        hidden, weight = hidden.t().contiguous().t(), torch.cat([weight, weight], dim=1)[:, : case["hidden"]]
    return hidden, weight, targets


@dataclass
class Board:
    """Where the threads of a group meet, and what each brings to a collective."""

    size: int
    parts: list[torch.Tensor] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.parts = [torch.empty(0)] * self.size
        self.barrier = threading.Barrier(self.size, timeout=COLLECTIVE_TIMEOUT_S)


@dataclass(frozen=True)
class ThreadGroup:
    """A process group in one process, as one of its threads sees it."""

    board: Board
    index: int

    @property
    def group_name(self) -> str:
        """Another one for each group: sizes that were compared are remembered by it."""
        return f"threads {id(self.board)}"

    def size(self) -> int:
        return self.board.size

    def rank(self) -> int:
        return self.index


def all_reduce(tensor: torch.Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM, *, group: ThreadGroup) -> None:
    """torch.distributed's, over threads."""
    group.board.parts[group.index] = tensor.detach().clone()
    group.board.barrier.wait()
    stacked = torch.stack(group.board.parts)
    group.board.barrier.wait()
    tensor.copy_(stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0))


@contextmanager
def collectives_over_threads() -> Iterator[None]:
    with patch.object(dist, "all_reduce", all_reduce):
        yield


@dataclass(frozen=True)
class Found:
    """What linear_logprob gives for one shard; the gradient of its weights, or what was added to their main_grad."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor


def run_shard(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, case: Case, group=None) -> Found:
    """All that one rank computes."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    is_added = case["gradient"] == "main_grad"
    if is_added:
        weight.main_grad = torch.ones(weight.shape)
    logprobs, entropy = linear_logprob(
        hidden,
        weight,
        targets,
        temperature=case["temperature"],
        true_vocab_size=case["vocab"],
        vocab_start=0 if group is None else group.rank() * len(weight),
        tp_group=group,
        entropy=case["entropy"],
    )
    loss = weighted_sum(logprobs, entropy, case["entropy"] == "differentiable")
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight), allow_unused=is_added)
    if is_added:
        assert grad_weight is None
        grad_weight = weight.main_grad.sub_(1)
    return Found(logprobs.detach(), None if entropy is None else entropy.detach(), grad_hidden, grad_weight)


def run_shards(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, case: Case) -> Found:
    """The ranks of a vocabulary-parallel head as threads; all must say the same of the rows."""
    board = Board(case["shards"])
    groups = [ThreadGroup(board, i) for i in range(board.size)]
    with collectives_over_threads(), ThreadPoolExecutor(board.size) as pool:
        runs = [
            pool.submit(run_shard, hidden, part, targets, case, group)
            for group, part in zip(groups, weight.chunk(board.size), strict=True)
        ]
        found = [run.result() for run in runs]
    first = found[0]
    for other in found[1:]:
        assert torch.equal(other.logprobs, first.logprobs)
        assert torch.equal(other.grad_hidden, first.grad_hidden)
        assert other.entropy is None or torch.equal(other.entropy, first.entropy)
    return Found(first.logprobs, first.entropy, first.grad_hidden, torch.cat([each.grad_weight for each in found]))


def compute_exact(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, case: Case) -> Found:
    """In float64; the gradient of weights for the rows that count."""
    w = weight[: case["vocab"]].double().contiguous()
    x = hidden.double().contiguous()
    logprobs, entropy = torch.zeros(2, case["rows"], dtype=torch.float64)
    grad_hidden, grad_weight = torch.zeros_like(x), torch.zeros_like(w)
    for rows in row_blocks(case):
        exact = exact_rows(x[rows] @ w.t(), targets, rows, case)
        logprobs[rows], entropy[rows] = exact.logprobs, exact.entropy
        grad_hidden[rows] = exact.grad_logits @ w
        grad_weight.addmm_(exact.grad_logits.t(), x[rows])
    return Found(logprobs, entropy, grad_hidden, grad_weight)


def compare_linear_logprob(case: Case) -> Errors:
    """The worst errors of log-probs, entropy and both gradients; AssertionError beyond what float32 explains."""
    hidden, weight, targets = make_head(case)
    found = (run_shards if case.get("shards", 1) > 1 else run_shard)(hidden, weight, targets, case)
    exact = compute_exact(hidden, weight, targets, case)

    assert (found.logprobs <= 0).all()
    assert found.grad_hidden.dtype == case["dtype"]
    assert found.grad_weight.dtype == (torch.float32 if case["gradient"] == "main_grad" else case["dtype"])
    assert found.grad_weight.shape == weight.shape
    assert (found.grad_weight[case["vocab"] :] == 0).all()
    assert (found.entropy is None) == (case["entropy"] == "none")
    errors = Errors()
    largest = (exact.logprobs.abs().max().item() if case["rows"] else 0) + 20 / case["temperature"]
    errors.compare("log-prob", found.logprobs, exact.logprobs, 4e-7 * largest)
    if found.entropy is not None:
        assert exact.entropy is not None
        errors.compare("entropy", found.entropy, exact.entropy, 4e-6 * largest)
    bound = 2e-6 * largest * (1 + case["rows"] ** 0.5)  # a weight's gradient is a sum over the rows
    errors.compare("gradient of hidden states", found.grad_hidden, exact.grad_hidden, bound)
    errors.compare("gradient of weights", found.grad_weight[: case["vocab"]], exact.grad_weight, bound)
    return errors
