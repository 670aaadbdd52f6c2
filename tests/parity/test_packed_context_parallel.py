"""Real gloo processes: loss and future-KL of packed response rows over context-parallel ranks equal one process.

Under zig-zag order the response rows of a sequence are spread unevenly: chunks of the prompt hold none, those around
its end some, and a padded chunk none again. The oracle knows nothing of chunks: it has whole responses in sample order.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_gather_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
ALL_GATHER, ALL_REDUCE = "_allgather_base_", "allreduce_"  # torch's operators
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


class CountedCollectives(TorchDispatchMode):
    """Name and bytes handed in of each operator of torch's process groups, whichever function it was called by.

    The functions of `torch.distributed`, the methods of a group and the functional collectives all end in these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            local = args[1] if name == ALL_GATHER else args[0]  # an all-gather's first is what it fills
            tensors = [leaf for leaf in tree_leaves(local) if isinstance(leaf, torch.Tensor)]
            self.calls.append((name, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def local_losses(rank: int, size: int, group: dist.ProcessGroup) -> dict:
    batch, logprobs = make_batch(SAMPLES)
    found = {}
    for name, config in CONFIGS.items():
        for samples in MICROBATCHES:
            packed = make_packed_tokens(batch, samples, PackingUnits(size, 2), rank)
            assert packed.ref_logprobs is not None
            with CountedCollectives() as counted:
                output, grad = compute_loss(
                    logprobs[packed.batch_rows], packed.old_logprobs, packed.advantages, packed.loss_mask,
                    packed.ref_logprobs, packed.segments, config, group if size > 1 else None,
                )  # fmt: skip
            sums = torch.stack([output.loss_sum.detach(), output.denominator.double()])
            dist.all_reduce(sums, group=group)
            statistics = all_reduce_statistics(output.statistics, group)
            found[f"{name}{samples}"] = {"sums": sums, "grad": grad, "rows": packed.batch_rows, "all": statistics}
            found[f"{name}{samples}"]["calls"] = counted.calls
    return found


@pytest.fixture(scope="module", params=[1, 2, 4, 8], ids=lambda size: f"cp{size}")
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
        # A head and a decay for two chunks of each sequence in float64, and two int64 counts of it
        calls = [(ALL_GATHER, len(samples) * 2 * 2 * 8), (ALL_REDUCE, len(samples) * 2 * 8)]
        assert found["calls"] == (calls if len(ranks) > 1 else [])
    torch.testing.assert_close(merged, expected, rtol=1e-11, atol=1e-13)


def local_scans(rank: int, size: int, group: dist.ProcessGroup) -> dict:
    """Float32 scans of a short batch and a long one, and what they sent."""
    found: dict = {"scans": [], "calls": []}
    for shape in (SAMPLES[:3], LONG):
        batch, values = make_batch(shape)
        packed = make_packed_tokens(batch, range(len(shape)), PackingUnits(size), rank)
        context_group = group if size > 1 else None
        with CountedCollectives() as counted:
            scan = future_kl_scan(
                values[packed.batch_rows].float(), GAMMA, packed.segments, context_group=context_group
            )
        found["scans"].append((packed.batch_rows, scan))
        found["calls"] += counted.calls
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
    one_each = [(ALL_GATHER, 3 * 2 * 2 * 4)] * 2
    assert [rank["calls"] for rank in ranks] == [one_each if size > 1 else []] * size


def count_each_way(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, int]:
    """Operators counted for each of several ways to communicate."""

    def reduce_in_backward() -> None:
        leaf = torch.ones(1, requires_grad=True)
        leaf.register_hook(lambda grad: dist.all_reduce(grad.clone(), group=group))
        leaf.sum().backward()

    def send_or_receive() -> None:
        if rank == 0:
            dist.send(torch.ones(2), 1, group=group)
        else:
            dist.recv(torch.ones(2), 0, group=group)

    ways = {
        "function": lambda: dist.all_reduce(torch.ones(2), group=group),
        "functional": lambda: all_gather_tensor(torch.ones(2), 0, group).sum(),
        "method": lambda: group.allreduce(torch.ones(2)).wait(),
        "backward": reduce_in_backward,
        "point to point": send_or_receive,
        "lists": lambda: dist.all_to_all_single(torch.ones(2), torch.ones(2), [1, 1], [1, 1], group=group),
        "scattered": lambda: dist.reduce_scatter_tensor(torch.ones(1), torch.ones(2), group=group),
        "broadcast": lambda: dist.broadcast(torch.ones(2), 0, group=group),
        "objects": lambda: dist.all_gather_object([None] * size, rank, group=group),
        "barrier": lambda: dist.barrier(group=group),
    }
    found = {}
    for name, communicate in ways.items():
        with CountedCollectives() as counted:
            communicate()
        found[name] = len(counted.calls)
    return found


def test_no_way_to_communicate_goes_uncounted(tmp_path):
    for counts in start_processes(count_each_way, 2, tmp_path):
        assert all(counts.values()), counts
