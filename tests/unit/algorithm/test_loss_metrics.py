"""Metrics against sorted tokens and plain Python; a mini-batch's do not depend on its microbatches."""

import math

import numpy as np
import pytest
import torch

from fipo_megatron.algorithm.fipo_loss import fipo_loss
from fipo_megatron.algorithm.loss_metrics import NUM_STATISTICS, QUANTILES, loss_metrics, reduce_statistics
from fipo_megatron.config.schema import AlgorithmConfig

SHAPE = (40, 60)


def make_rows(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(SHAPE, dtype=torch.float64, generator=generator)
    drift = torch.randn(SHAPE, dtype=torch.float64, generator=generator) ** 3 / 4
    return {
        "logprobs": (old + drift).requires_grad_(),
        "old_logprobs": old,
        "advantages": torch.randn(SHAPE[0], 1, dtype=torch.float64, generator=generator).expand(SHAPE),
        "response_mask": torch.rand(SHAPE, generator=generator) > 0.3,
        "entropy": torch.rand(SHAPE, dtype=torch.float64, generator=generator),
        "ref_logprobs": old,
    }


def metrics_of(rows: dict[str, torch.Tensor], config: AlgorithmConfig) -> dict[str, float]:
    return loss_metrics(fipo_loss(**rows, config=config).statistics, config)


def test_quantiles_are_those_of_the_sorted_tokens():
    rows = make_rows()
    metrics = metrics_of(rows, AlgorithmConfig())
    log_ratios = (rows["logprobs"] - rows["old_logprobs"]).detach()
    for sign, chosen in (("pos", rows["advantages"] > 0), ("neg", rows["advantages"] < 0)):
        tokens = log_ratios[chosen & rows["response_mask"]].numpy()
        for name, fraction in QUANTILES.items():
            exact = np.quantile(tokens, fraction, method="inverted_cdf")
            assert math.log(metrics[f"ratio_{sign}_{name}"]) == pytest.approx(exact, rel=0.011, abs=1.1e-5)
        assert metrics[f"ratio_{sign}_max"] == pytest.approx(math.exp(tokens.max()), rel=1e-12)


def test_a_quantile_is_the_smallest_ratio_that_reaches_its_share():
    old = torch.zeros(1, 4)
    output = fipo_loss(torch.tensor([[0.4, 0.1, 0.3, 0.2]]), old, old + 1, old + 1, AlgorithmConfig())
    metrics = loss_metrics(output.statistics, AlgorithmConfig())
    found = [math.log(metrics[f"ratio_pos_{name}"]) for name in ("p25", "p50", "p75", "p99_9")]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=0.011)


def test_means_and_shares():
    rows, config = make_rows(), AlgorithmConfig(dual_clip_ratio=6.0)
    metrics = metrics_of(rows, config)
    mask = rows["response_mask"]
    d = (rows["logprobs"] - rows["old_logprobs"]).detach()[mask]
    advantages = rows["advantages"][mask]
    ratios = d.exp()[advantages < 0]
    expected = {
        "policy_kl": -d.mean(),
        "advantage_token_mean": advantages.mean(),
        "entropy": rows["entropy"][mask].mean(),
        "reference_kl": ((-d).exp() + d - 1).mean(),
        "neg_ratio_frac_2_3": ((ratios >= 2) & (ratios < 3)).double().mean(),
        "neg_ratio_frac_3_4": ((ratios >= 3) & (ratios < 4)).double().mean(),
        "neg_ratio_frac_4_c": ((ratios >= 4) & (ratios < 6)).double().mean(),
    }
    assert all(value > 0 for name, value in expected.items() if name.startswith("neg"))
    assert {name: metrics[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()})
    output = fipo_loss(**rows, config=config)
    assert metrics["loss"] == pytest.approx((output.loss_sum / output.denominator).item(), rel=1e-12)


@pytest.mark.parametrize("preset", ["fipo_32b", "fipo_7b"])
def test_active_weights_are_those_other_than_one(preset):
    """By hand, half-life 1: in row 0 F = (0.3, 0.2, 0.4, 0), in row 1 its negatives; A = 1, so no safety rule."""
    old = torch.zeros(2, 4, dtype=torch.float64)
    log_ratios = torch.tensor([[0.2, 0.0, 0.4, 0.0], [-0.2, 0.0, -0.4, 0.0]], dtype=torch.float64)
    config = AlgorithmConfig(preset=preset, half_life_tokens=1.0)
    metrics = loss_metrics(fipo_loss(log_ratios, old, old + 1, old + 1, config).statistics, config)
    assert metrics["influence_active_frac"] == {"fipo_32b": 3 / 8, "fipo_7b": 6 / 8}[preset]


@pytest.mark.parametrize("objective", ["fipo", "dapo", "grpo"])
def test_microbatches_add_up(objective):
    rows, config = make_rows(), AlgorithmConfig(objective=objective)
    whole = fipo_loss(**rows, config=config).statistics
    parts = [
        fipo_loss(**{name: value[start:stop] for name, value in rows.items()}, config=config).statistics
        for start, stop in ((0, 1), (1, 7), (7, 7), (7, 40))
    ]
    torch.testing.assert_close(reduce_statistics(parts), whole, rtol=1e-12, atol=1e-12)
    assert loss_metrics(reduce_statistics([whole]), config) == loss_metrics(whole, config)


def test_no_microbatch_changes_nothing():
    nothing = reduce_statistics([])
    assert nothing.shape == (NUM_STATISTICS,)
    some = fipo_loss(**make_rows(), config=AlgorithmConfig()).statistics
    assert torch.equal(reduce_statistics([nothing, some]), some)


def test_metrics_without_data_are_left_out():
    rows = make_rows()
    del rows["entropy"], rows["ref_logprobs"]
    rows["advantages"] = torch.ones(SHAPE, dtype=torch.float64)
    metrics = metrics_of(rows, AlgorithmConfig(objective="dapo"))
    absent = ("entropy", "reference_kl", "influence", "ratio_neg", "neg_ratio")
    assert [name for name in metrics if name.startswith(absent)] == []
    assert "ratio_pos_p50" in metrics


def test_a_lost_policy_shows_in_the_loss():
    rows = make_rows()
    rows["logprobs"] = rows["logprobs"].detach().clone()
    rows["logprobs"][rows["response_mask"]] = torch.nan
    assert math.isnan(metrics_of(rows, AlgorithmConfig())["loss"])


def test_raw_influence_stays_finite():
    rows = make_rows()
    rows["logprobs"] = (rows["old_logprobs"] + 20.0).requires_grad_()
    metrics = metrics_of(rows, AlgorithmConfig(half_life_tokens=1e6, dual_clip_ratio=1e9, safety_threshold=1e12))
    assert math.isfinite(metrics["influence_raw_mean"])
    assert metrics["influence_mean"] == pytest.approx(1.2)
