"""Real gloo processes: loss and future-KL of packed response rows over context-parallel ranks equal one process.

Under zig-zag order the response rows of a sequence are spread unevenly: chunks of the prompt hold none, those around
its end some, and a padded chunk none again. The oracle knows nothing of chunks: it has whole responses in sample order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fipo_megatron.algorithm.fipo_loss import fipo_loss
from fipo_megatron.algorithm.loss_metrics import all_reduce_statistics, loss_metrics
from fipo_megatron.config.schema import AlgorithmConfig
from fipo_megatron.ops.future_kl_scan import future_kl_scan
from fipo_megatron.parallel.packed import make_packed_tokens, merge_response_rows
from fipo_megatron.parallel.plan import PackingUnits
from fipo_megatron.types import SegmentTable, TrainingBatch
from tests.parity.gloo_processes import start_processes

pytestmark = pytest.mark.multiproc

# (prompt, response) tokens of each sample; microbatches of a batch in any order of its samples
SAMPLES = [(3, 1), (1, 90), (70, 2), (5, 31), (40, 60), (1, 1)]
MICROBATCHES = [(4, 0, 2), (), (5,), (3, 1)]
CONFIGS = {
    "fipo": AlgorithmConfig(),
    "dropping": AlgorithmConfig(
        dual_clip_ratio=1.5, loss_aggregation="seq-mean-token-mean", reference_kl_coef=0.2, half_life_tokens=8.0
    ),
    "both_sides": AlgorithmConfig(influence_clip_high_only=False, loss_aggregation="seq-mean-token-sum"),
}
GAMMA = 2 ** (-1 / 4096)  # hardly fades over the longest response
LONG = [(500, 11_000), (9_000, 300), (1, 1)]


def make_batch(samples: list[tuple[int, int]]) -> tuple[TrainingBatch, torch.Tensor]:
    """A batch with holes in its mask, and the policy's log-probs of all its response rows, float64."""
    generator = np.random.default_rng(len(samples))
    prompts, responses = np.array(samples).T
    num_rows = int(responses.sum())
    old = -generator.random(num_rows).astype(np.float32)
    batch = TrainingBatch(
        token_ids=generator.integers(1, 100, (prompts + responses).sum()),
        cu_seqlens=np.cumsum([0, *(prompts + responses)]),
        prompt_lens=prompts,
        advantages=np.where(np.arange(len(samples)) % 2, -1, 0.8).astype(np.float32),
        old_logprobs=old,
        ref_logprobs=old + np.float32(0.1),
        loss_mask=generator.random(num_rows) > 0.1,
    )
    return batch, torch.from_numpy(old + 0.5 * generator.standard_normal(num_rows))


def compute_loss(logprobs, old_logprobs, advantages, loss_mask, ref_logprobs, segments, config, group=None):
    logprobs = logprobs.clone().requires_grad_()
    output = fipo_loss(
        logprobs, old_logprobs, advantages, loss_mask, config,
        segments=segments, entropy=old_logprobs.double(), ref_logprobs=ref_logprobs, context_group=group,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(output.loss_sum, logprobs)
    return output, grad


COMMUNICATING = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_reduce",
    "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
)  # fmt: skip


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """Name and bytes handed in of each call that communicates."""
    calls: list[tuple[str, int]] = []

    def counting(name, original):
        def call(*args, **kwargs):
            local = args[1] if name == "all_gather_into_tensor" else args[0]
            calls.append((name, local.numel() * local.element_size()))
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in COMMUNICATING:
            stack.enter_context(patch.object(dist, name, counting(name, getattr(dist, name))))
        yield calls


def local_losses(rank: int, size: int, group: dist.ProcessGroup) -> dict:
    batch, logprobs = make_batch(SAMPLES)
    found = {}
    for name, config in CONFIGS.items():
        for samples in MICROBATCHES:
            packed = make_packed_tokens(batch, samples, PackingUnits(size, 2), rank)
            assert packed.ref_logprobs is not None
            with counted_collectives() as calls:
                output, grad = compute_loss(
                    logprobs[packed.batch_rows], packed.old_logprobs, packed.advantages, packed.loss_mask,
                    packed.ref_logprobs, packed.segments, config, group,
                )  # fmt: skip
            sums = torch.stack([output.loss_sum.detach(), output.denominator.double()])
            dist.all_reduce(sums, group=group)
            statistics = all_reduce_statistics(output.statistics, group)
            found[f"{name}{samples}"] = {"sums": sums, "grad": grad, "rows": packed.batch_rows, "all": statistics}
            found[f"{name}{samples}"]["calls"] = [call for call, _ in calls]
    return found


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"cp{size}")
def ranks(request, tmp_path_factory):
    return start_processes(local_losses, request.param, tmp_path_factory.mktemp("cp"))


@pytest.mark.parametrize("samples", MICROBATCHES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_of_response_rows_equals_one_process(ranks, name, samples):
    batch, logprobs = make_batch(SAMPLES)
    lens = np.array([n for _, n in SAMPLES])
    starts = np.cumsum(lens) - lens
    rows = np.concatenate([np.arange(0), *(np.arange(starts[i], starts[i] + lens[i]) for i in samples)])
    output, grad = compute_loss(
        logprobs[rows],
        torch.from_numpy(batch.old_logprobs[rows]),
        torch.from_numpy(np.repeat(batch.advantages, lens)[rows]),
        torch.from_numpy(batch.loss_mask[rows]),
        torch.from_numpy(batch.ref_logprobs[rows]),
        SegmentTable(torch.tensor([0, *lens[list(samples)]]).cumsum(0)),
        CONFIGS[name],
    )
    if name == "dropping" and samples == (3, 1):
        assert loss_metrics(output.statistics, CONFIGS[name])["dropped_sequences"] > 0
    expected = torch.zeros(len(logprobs), dtype=torch.float64).index_copy(0, torch.from_numpy(rows), grad)
    merged = torch.zeros_like(expected)
    for found in (rank[f"{name}{samples}"] for rank in ranks):
        merged[found["rows"]] = found["grad"]
        torch.testing.assert_close(
            found["sums"], torch.stack([output.loss_sum.detach(), output.denominator.double()]), rtol=1e-11, atol=1e-12
        )
        torch.testing.assert_close(found["all"], output.statistics, rtol=1e-11, atol=1e-12)
        assert found["calls"] == ["all_gather_into_tensor", "all_reduce"]  # carries, and counts a sequence
    torch.testing.assert_close(merged, expected, rtol=1e-11, atol=1e-13)


def local_scans(rank: int, size: int, group: dist.ProcessGroup) -> dict:
    """Float32 scans of a short batch and a long one, and what they sent."""
    found: dict = {"scans": [], "calls": []}
    for shape in (SAMPLES[:3], LONG):
        batch, values = make_batch(shape)
        packed = make_packed_tokens(batch, range(len(shape)), PackingUnits(size), rank)
        context_group = group if size > 1 else None
        with counted_collectives() as calls:
            scan = future_kl_scan(
                values[packed.batch_rows].float(), GAMMA, packed.segments, context_group=context_group
            )
        found["scans"].append((packed.batch_rows, scan))
        found["calls"] += calls
    return found


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_scan_equals_the_float64_oracle_in_one_collective(size, tmp_path):
    ranks = start_processes(local_scans, size, tmp_path)
    for i, shape in enumerate((SAMPLES[:3], LONG)):
        _, values = make_batch(shape)
        segments = SegmentTable(torch.tensor([0, *(n for _, n in shape)]).cumsum(0))
        exact = future_kl_scan(values.float().double(), GAMMA, segments, impl="reference")
        found = merge_response_rows((rows.numpy(), scan.numpy()) for rows, scan in (rank["scans"][i] for rank in ranks))
        assert np.linalg.norm(found - exact.numpy()) <= 1e-5 * exact.norm().item()
    # One all-gather each, of a head and a decay for two chunks of three samples in float32: no matter how long
    one_each = [("all_gather_into_tensor", 3 * 2 * 2 * 4)] * 2
    assert all(rank["calls"] == (one_each if size > 1 else []) for rank in ranks)
