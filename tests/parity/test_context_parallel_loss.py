"""Real gloo processes: the loss over context-parallel ranks equals that of one process.

What is shown: loss, denominator, gradient and every statistic are sums over ranks of what each rank computes on its
zig-zag chunks. The loss of each microbatch is compared, so the sum over microbatches and data ranks follows.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fipo_megatron.algorithm.fipo_loss import fipo_loss
from fipo_megatron.algorithm.loss_metrics import all_reduce_statistics, loss_metrics
from fipo_megatron.config.schema import AlgorithmConfig
from fipo_megatron.ops.future_kl_scan import future_kl_scan
from fipo_megatron.types import SegmentTable
from tests.parity.gloo_processes import start_processes
from tests.parity.zigzag import merge_zigzag, split_zigzag

pytestmark = pytest.mark.multiproc

SEQUENCE_NORM = 64
# Sequences of 8 chunks at most (cp = 4); [0] is a batch without any token.
LENGTHS = {"two": [32, 48], "three": [8, 64, 160], "empty_segments": [0, 40, 0], "nothing": [0]}
CONFIGS = {
    "fipo": {},
    "dropping": {"dual_clip_ratio": 1.5, "loss_aggregation": "seq-mean-token-mean", "reference_kl_coef": 0.2},
    "both_sides": {"influence_clip_high_only": False, "loss_aggregation": "seq-mean-token-sum"},
    "norm": {"loss_aggregation": "seq-mean-token-sum-norm"},
    "grpo": {"objective": "grpo"},
}


def make_segments(lengths: list[int]) -> SegmentTable:
    return SegmentTable(torch.tensor([0, *lengths]).cumsum(0))


def make_tokens(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Flat tokens; the first third of each sequence is prompt, so early chunks hold nothing else."""
    generator = torch.Generator().manual_seed(sum(lengths))
    n = sum(lengths)
    old = -torch.rand(n, dtype=torch.float64, generator=generator)
    mask = torch.cat([torch.arange(length) >= length // 3 for length in lengths])
    return {
        "logprobs": old + 0.5 * torch.randn(n, dtype=torch.float64, generator=generator),
        "old_logprobs": old,
        "advantages": torch.cat([torch.full((k,), -1.0 if i % 2 else 0.8) for i, k in enumerate(lengths)]).double(),
        "response_mask": mask & (torch.rand(n, generator=generator) > 0.1),
        "entropy": torch.rand(n, dtype=torch.float64, generator=generator),
        "ref_logprobs": old + 0.1,
    }


def dual_clip_two_ends(tokens: dict[str, torch.Tensor], lengths: list[int]) -> None:
    """One dual-clipped token in the first chunk of responses and one in the last, of the second sequence."""
    first, last = sum(lengths[:1]) + lengths[1] // 3, sum(lengths[:2]) - 1
    tokens["response_mask"][[first, last]] = True
    tokens["logprobs"][[first, last]] = tokens["old_logprobs"][[first, last]] + 4.0


def loss_cases() -> dict[str, tuple[dict[str, torch.Tensor], list[int], AlgorithmConfig]]:
    cases = {}
    for batch, lengths in LENGTHS.items():
        for name, change in CONFIGS.items():
            cases[f"{batch}-{name}"] = (make_tokens(lengths), lengths, AlgorithmConfig(**change))
    tokens = make_tokens(LENGTHS["three"])
    dual_clip_two_ends(tokens, LENGTHS["three"])
    cases["drop_spans_ranks"] = (tokens, LENGTHS["three"], AlgorithmConfig())
    return cases


def compute_loss(tokens, lengths, config, group=None):
    tokens = {**tokens, "logprobs": tokens["logprobs"].clone().requires_grad_()}
    output = fipo_loss(
        **tokens,
        config=config,
        segments=make_segments(lengths),
        context_group=group,
        sequence_norm=SEQUENCE_NORM,
    )
    (grad,) = torch.autograd.grad(output.loss_sum, tokens["logprobs"])
    return output, grad


def local_losses(rank: int, size: int, group: dist.ProcessGroup) -> dict:
    found = {}
    for name, (tokens, lengths, config) in loss_cases().items():
        local = {key: split_zigzag(value, lengths, rank, size) for key, value in tokens.items()}
        output, grad = compute_loss(local, [n // size for n in lengths], config, group)
        sums = torch.stack([output.loss_sum.detach(), output.denominator.double()])
        dist.all_reduce(sums, group=group)
        found[name] = {"sums": sums, "grad": grad, "statistics": all_reduce_statistics(output.statistics, group)}
    return found


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"cp{size}")
def ranks(request, tmp_path_factory):
    return start_processes(local_losses, request.param, tmp_path_factory.mktemp("cp"))


@pytest.mark.parametrize("name", sorted(loss_cases()))
def test_loss_equals_one_process(ranks, name):
    tokens, lengths, config = loss_cases()[name]
    output, grad = compute_loss(tokens, lengths, config)
    expected = torch.stack([output.loss_sum.detach(), output.denominator.double()])
    merged = merge_zigzag([found[name]["grad"] for found in ranks], lengths)
    torch.testing.assert_close(merged, grad, rtol=1e-11, atol=1e-13)
    for found in ranks:
        torch.testing.assert_close(found[name]["sums"], expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found[name]["statistics"], output.statistics, rtol=1e-11, atol=1e-12)


def test_the_drop_spans_ranks():
    """The two tokens that drop the second sequence lie on different ranks, and each alone would not drop it."""
    tokens, lengths, config = loss_cases()["drop_spans_ranks"]
    output, grad = compute_loss(tokens, lengths, config)
    assert loss_metrics(output.statistics, config)["dropped_sequences"] == 1
    assert grad[lengths[0] : sum(lengths[:2])].abs().max().item() == 0
    for size in (2, 4):
        beyond = tokens["logprobs"] - tokens["old_logprobs"] > 3.9
        assert [int(split_zigzag(beyond, lengths, rank, size).sum()) for rank in range(size)].count(1) == 2


def local_scan(rank: int, size: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    found = []
    for lengths in LENGTHS.values():
        values = make_tokens(lengths)["logprobs"]
        local = split_zigzag(values, lengths, rank, size)
        segments = make_segments([n // size for n in lengths])
        scan = future_kl_scan(local, 0.97, segments, context_group=group)
        assert torch.allclose(scan, future_kl_scan(local, 0.97, segments, context_group=group, impl="reference"))
        found.append(scan)
    with pytest.raises(ValueError, match="cannot be two equal zig-zag halves"):
        future_kl_scan(torch.zeros(3), 0.5, make_segments([3]), context_group=group)
    return found


def test_scan_over_four_ranks(tmp_path):
    found = start_processes(local_scan, 4, tmp_path)
    for i, lengths in enumerate(LENGTHS.values()):
        values = make_tokens(lengths)["logprobs"]
        expected = future_kl_scan(values, 0.97, make_segments(lengths), impl="reference")
        merged = merge_zigzag([rank[i] for rank in found], lengths)
        torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
