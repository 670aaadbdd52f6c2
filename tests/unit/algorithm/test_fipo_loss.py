"""The loss against plain Python, over every switch; its indifference to layout; and what may stand under the mask."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fipo_megatron.algorithm.fipo_loss import fipo_loss
from fipo_megatron.algorithm.loss_metrics import loss_metrics
from fipo_megatron.config.schema import AlgorithmConfig
from fipo_megatron.types import LossOutput, SegmentTable
from tests.unit.algorithm.loss_by_hand import Sequence, Totals, loss_by_hand

SEQUENCE_NORM = 64
LENGTHS = (17, 1, 40, 0, 25, 33)
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
CONFIGS = {
    "fipo": {},
    "both_sides": {"influence_clip_high_only": False, "safety_threshold": 1.5},
    "unclipped": {"influence_clip": 0.0, "half_life_tokens": 3.0},
    "reset": {"safety_rule": "reset", "safety_threshold": 1.2},
    "no_dual_clip": {"dual_clip_ratio": None},
    "low_dual_clip": {"dual_clip_ratio": 1.5},
    "reference_kl": {"reference_kl_coef": 0.3},
    "dapo": {"objective": "dapo", "dual_clip_ratio": 2.0},
    "grpo": {"objective": "grpo"},
}


def make_sequences(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, drift: float = 0.7) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(n, dtype=torch.float64, generator=generator)

    sequences = []
    for n in lengths:
        old = -normal(n).abs()
        sequences.append(
            Sequence(
                logprobs=(old + drift * normal(n)).tolist(),
                old_logprobs=old.tolist(),
                advantages=normal(1).expand(n).tolist(),
                mask=(torch.rand(n, generator=generator) > 0.2).tolist(),
                ref_logprobs=(old + 0.2 * normal(n)).tolist(),
            )
        )
    if (
        len(sequences) > 2 and lengths[2] > 30
    ):  # exactly one dual-clipped token, one beyond the clamp, one of them masked
        long = sequences[2]
        long.advantages = [-1.0] * lengths[2]
        long.logprobs = list(long.old_logprobs)
        long.mask = [True] * lengths[2]
        long.logprobs[5] += 25.0
        long.logprobs[9] += 25.0
        long.mask[9] = False
    return sequences


def joined(sequences: list[Sequence], name: str) -> torch.Tensor:
    dtype = torch.bool if name == "mask" else torch.float64
    return torch.cat([torch.tensor(getattr(s, name), dtype=dtype) for s in sequences])


def run_flat(sequences: list[Sequence], config: AlgorithmConfig) -> tuple[LossOutput, torch.Tensor]:
    logprobs = joined(sequences, "logprobs").requires_grad_()
    output = fipo_loss(
        logprobs,
        joined(sequences, "old_logprobs"),
        joined(sequences, "advantages"),
        joined(sequences, "mask"),
        config,
        segments=SegmentTable(torch.tensor([0, *(len(s.mask) for s in sequences)]).cumsum(0)),
        ref_logprobs=joined(sequences, "ref_logprobs"),
        sequence_norm=SEQUENCE_NORM,
    )
    (grad,) = torch.autograd.grad(output.loss_sum, logprobs)
    return output, grad


def compare(output: LossOutput, grad: torch.Tensor, expected: Totals) -> None:
    torch.testing.assert_close(output.loss_sum.item(), expected.loss_sum, rtol=1e-11, atol=1e-12)
    assert output.denominator.item() == expected.denominator
    flat = torch.tensor([g for row in expected.grads for g in row], dtype=torch.float64)
    torch.testing.assert_close(grad, flat, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("name", "aggregation"), list(itertools.product(CONFIGS, AGGREGATIONS)))
def test_equals_the_loss_by_hand(name, aggregation):
    config = AlgorithmConfig(**{**CONFIGS[name], "loss_aggregation": aggregation})
    sequences = make_sequences()
    expected = loss_by_hand(sequences, config, SEQUENCE_NORM)
    compare(*run_flat(sequences, config), expected)


def test_the_inputs_reach_every_rule():
    """Without this the comparison above could pass for want of a case."""
    low = loss_by_hand(make_sequences(), AlgorithmConfig(dual_clip_ratio=1.5), SEQUENCE_NORM)
    assert low.dropped >= 1
    assert low.denominator > 0
    usual = loss_by_hand(make_sequences(), AlgorithmConfig(), SEQUENCE_NORM)
    assert (usual.dual_clipped, usual.dropped) == (1, 0)
    assert usual.clipped > 10
    assert len(set(usual.weights)) > 5
    assert max(usual.log_ratios) == 20.0


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5).map(tuple),
    seed=st.integers(0, 10_000),
    name=st.sampled_from(sorted(CONFIGS)),
    aggregation=st.sampled_from(AGGREGATIONS),
)
def test_packed_equals_padded_equals_one_by_one(lengths, seed, name, aggregation):
    config = AlgorithmConfig(**{**CONFIGS[name], "loss_aggregation": aggregation})
    sequences = make_sequences(lengths, seed)
    packed, packed_grad = run_flat(sequences, config)
    singles = [run_flat([s], config) for s in sequences]
    torch.testing.assert_close(packed.loss_sum, sum(o.loss_sum for o, _ in singles), rtol=1e-10, atol=1e-12)
    assert packed.denominator == sum(o.denominator for o, _ in singles)
    torch.testing.assert_close(packed_grad, torch.cat([g for _, g in singles]), rtol=1e-10, atol=1e-12)

    width = max(lengths) + 2
    rows = {}
    for field in ("logprobs", "old_logprobs", "advantages", "mask", "ref_logprobs"):
        parts = joined(sequences, field).split(list(lengths))
        # a masked column on the left: the prompt
        rows[field] = torch.stack([torch.nn.functional.pad(p, (1, width - len(p) - 1)) for p in parts])
    rows["logprobs"].requires_grad_()
    padded = fipo_loss(
        rows["logprobs"],
        rows["old_logprobs"],
        rows["advantages"],
        rows["mask"],
        config,
        ref_logprobs=rows["ref_logprobs"],
        sequence_norm=SEQUENCE_NORM,
    )
    (grad,) = torch.autograd.grad(padded.loss_sum, rows["logprobs"])
    unpadded = torch.cat([row[1 : 1 + n] for row, n in zip(grad, lengths, strict=True)])
    torch.testing.assert_close(padded.loss_sum, packed.loss_sum, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(unpadded, packed_grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(padded.statistics, packed.statistics, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_what_stands_under_the_mask_does_not_matter(name, garbage):
    config = AlgorithmConfig(**CONFIGS[name])
    clean, clean_grad = run_flat(make_sequences(), config)
    sequences = make_sequences()
    for s in sequences:
        for field in ("old_logprobs", "advantages", "ref_logprobs"):
            values = getattr(s, field)
            values[:] = [v if m else garbage for v, m in zip(values, s.mask, strict=True)]
    dirty, dirty_grad = run_flat(sequences, config)
    assert torch.equal(dirty.loss_sum, clean.loss_sum)
    assert torch.equal(dirty_grad, clean_grad)
    assert torch.equal(dirty.statistics, clean.statistics)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (2, 5)])
def test_nothing_to_learn_from_is_zero_with_a_graph(shape, aggregation):
    config = AlgorithmConfig(loss_aggregation=aggregation)
    logprobs = torch.zeros(shape, requires_grad=True)
    nothing = torch.zeros(shape)
    old = torch.full(shape, -torch.inf)
    output = fipo_loss(logprobs, old, nothing, nothing, config, entropy=nothing, sequence_norm=8)
    assert output.loss_sum.requires_grad
    assert (output.loss_sum.item(), output.denominator.item()) == (0.0, 0)
    output.loss_sum.backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, nothing)
    metrics = loss_metrics(output.statistics, config)
    assert all(value == 0 for value in metrics.values())


def test_gradient_flows_through_logprobs_only():
    logprobs, old, advantages, entropy, ref = (torch.randn(2, 8, requires_grad=True) for _ in range(5))
    config = AlgorithmConfig(reference_kl_coef=0.1)
    output = fipo_loss(logprobs, old, advantages, torch.ones(2, 8), config, entropy=entropy, ref_logprobs=ref)
    assert output.denominator.dtype == torch.int64
    assert not output.statistics.requires_grad
    output.loss_sum.backward()
    assert logprobs.grad is not None
    assert [tensor.grad for tensor in (old, advantages, entropy, ref)] == [None] * 4


def test_an_entropy_bonus_is_taken_off_every_token_that_counts():
    """The second row is dropped: two tokens far above the old policy, disliked."""
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    old, advantages = torch.full((2, 4), -4.0), torch.tensor([[1.0] * 4, [-1.0] * 4])
    logprobs = torch.tensor([[-4.0] * 4, [-1.0, -1.0, -4.0, -4.0]])
    entropy = torch.tensor([[0.5, 1.0, math.nan, 2.0], [7.0, 7.0, 7.0, 7.0]], requires_grad=True)
    plain = fipo_loss(logprobs, old, advantages, mask, AlgorithmConfig(), entropy=entropy)
    bonus = fipo_loss(logprobs, old, advantages, mask, AlgorithmConfig(entropy_coef=0.25), entropy=entropy)
    assert plain.denominator.item() == bonus.denominator.item() == 3
    assert (bonus.loss_sum - plain.loss_sum).item() == pytest.approx(-0.25 * (0.5 + 1.0 + 2.0))
    bonus.loss_sum.backward()
    assert entropy.grad is not None
    assert entropy.grad.tolist() == [[-0.25, -0.25, 0.0, -0.25], [0.0] * 4]


def test_a_weight_of_zero_is_not_dual_clipped():
    """exp(F) underflows where a policy leaves a whole response: that is no reason to drop the sequence."""
    old, ones = torch.zeros(1, 50), torch.ones(1, 50)
    config = AlgorithmConfig(influence_clip=0.0, half_life_tokens=1e6)
    output = fipo_loss(old - 20, old, -ones, ones, config)
    assert output.denominator.item() == 50


def test_on_policy_fipo_is_dapo():
    """d is 0 before the first update of a rollout batch, and exp(0) = 1."""
    logprobs, advantages, mask = -torch.rand(3, 20), torch.randn(3, 20), torch.ones(3, 20)
    fipo = fipo_loss(logprobs, logprobs, advantages, mask, AlgorithmConfig())
    dapo = fipo_loss(logprobs, logprobs, advantages, mask, AlgorithmConfig(objective="dapo"))
    assert torch.equal(fipo.loss_sum, dapo.loss_sum)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(2, 3)}, r"advantages is \[2, 3\]"),
        ({"entropy": torch.zeros(8)}, r"entropy is \[8\]"),
        ({"logprobs": torch.zeros(2, 4).bfloat16()}, "logprobs is torch.bfloat16"),
        ({"logprobs": torch.zeros(8)}, "pass rows"),
        ({"segments": SegmentTable(torch.tensor([0, 8]))}, "pass rows"),
        ({"config": AlgorithmConfig(reference_kl_coef=0.1)}, "reference_kl_coef=0.1 needs ref_logprobs"),
        ({"config": AlgorithmConfig(entropy_coef=0.1)}, "entropy_coef=0.1 needs entropy"),
        ({"config": AlgorithmConfig(loss_aggregation="seq-mean-token-sum-norm")}, "sequence_norm=None"),
    ],
)
def test_refuses(change, message):
    values = torch.zeros(2, 4)
    arguments = {
        "logprobs": values,
        "old_logprobs": values,
        "advantages": values,
        "response_mask": values,
        "config": AlgorithmConfig(),
    } | change
    with pytest.raises(ValueError, match=message):
        fipo_loss(**arguments)


def test_refuses_the_table_of_another_batch():
    values = torch.zeros(8)
    with pytest.raises(ValueError, match="segments end at token 9, logprobs has 8"):
        fipo_loss(values, values, values, values, AlgorithmConfig(), segments=SegmentTable(torch.tensor([0, 9])))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_whose_sequences_are_all_dropped_changes_nothing(aggregation):
    config = AlgorithmConfig(loss_aggregation=aggregation)
    logprobs = torch.full((3, 4), -0.5, requires_grad=True)
    response = torch.ones(3, 4)
    output = fipo_loss(logprobs, logprobs.detach() - 3.0, -response, response, config, sequence_norm=8)  # ratio e^3 > c
    assert (output.loss_sum.item(), output.denominator.item()) == (0.0, 0)
    output.loss_sum.backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, torch.zeros(3, 4))
    metrics = loss_metrics(output.statistics, config)
    assert metrics["dropped_sequences"] == 3
    assert all(math.isfinite(value) for value in metrics.values())
