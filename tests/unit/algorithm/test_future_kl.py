"""Log-ratio, filter, weights and the safety rule, one number at a time."""

import math

import numpy as np
import pytest
import torch

from fipo_megatron.algorithm.future_kl import (
    future_kl,
    influence_bounds,
    influence_weights,
    log_ratio,
    response_influence_weights,
)
from fipo_megatron.config.schema import AlgorithmConfig
from fipo_megatron.types import SegmentTable


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_log_ratio_is_clamped_and_masked():
    mask = torch.tensor([True, True, True, False])
    found = log_ratio(tensor(-1, 30, -30, math.nan), tensor(-1.5, 0, 0, math.inf), mask)
    assert found.tolist() == [0.5, 20.0, -20.0, 0.0]


def test_future_kl_filters_but_keeps_the_tokens_own_sum():
    """gamma = 1/2. Token 1 is beyond log(10) = 2.3 and counts for none; token 2 is masked and still ages the signal."""
    mask = torch.tensor([True, True, False, True])
    segments = SegmentTable(torch.tensor([0, 4]))
    config = AlgorithmConfig(half_life_tokens=1.0)
    assert future_kl(tensor(0.5, 3, 7, -2), mask, config, segments).tolist() == [0.25, -0.5, -1.0, -2.0]
    unfiltered = config.model_copy(update={"dual_clip_ratio": None})
    assert future_kl(tensor(0.5, 3, 7, -2), mask, unfiltered, segments).tolist() == [1.75, 2.5, -1.0, -2.0]


def test_the_filter_keeps_a_token_at_its_limit():
    limit = math.log(10)
    found = future_kl(tensor(limit), torch.tensor([True]), AlgorithmConfig(), SegmentTable(torch.tensor([0, 1])))
    assert found.item() == limit


@pytest.mark.parametrize(
    ("change", "bounds"),
    [
        ({}, (1.0, 1.2)),
        ({"influence_clip_high_only": False}, (0.8, 1.2)),
        ({"influence_clip": 0.0}, (0.0, 10.0)),
        ({"influence_clip": 0.0, "influence_clip_high_only": False}, (0.0, 10.0)),
    ],
)
def test_bounds(change, bounds):
    config = AlgorithmConfig(**change)
    assert influence_bounds(config) == bounds
    weights = influence_weights(tensor(-50, 0, 50), torch.ones(3), torch.ones(3), config)
    torch.testing.assert_close(weights, tensor(max(bounds[0], math.exp(-50)), 1, bounds[1]), rtol=1e-15, atol=0)


@pytest.mark.parametrize(("rule", "expected"), [("clamp", [1.0, 0.8, 1.2, 1.2]), ("reset", [1.0, 1.0, 1.2, 1.2])])
def test_safety_rule(rule, expected):
    """It acts where A < 0 and the ratio is above 3: on the first two, not at the threshold, not for A > 0."""
    config = AlgorithmConfig(influence_clip=0.4, influence_clip_high_only=False, safety_threshold=3.0, safety_rule=rule)
    futures = tensor(9, -9, math.log(1.2), math.log(1.2))
    weights = influence_weights(futures, tensor(3.1, 3.1, 3.0, 9.0), tensor(-1, -1, -1, 1), config)
    torch.testing.assert_close(weights, tensor(*expected), rtol=1e-12, atol=0)


def test_an_overflowing_future_is_a_weight_at_its_bound():
    weights = influence_weights(torch.tensor([1e4]), torch.ones(1), torch.ones(1), AlgorithmConfig())
    assert weights.item() == pytest.approx(1.2)


@pytest.mark.parametrize("preset", ["fipo_32b", "fipo_7b"])
def test_weights_of_responses_are_those_of_equations_3_to_7(preset):
    """Token by token in plain Python: no response hears of another, and the safety rule needs the response's sign."""
    rng = np.random.default_rng(0)
    config = AlgorithmConfig(preset=preset, half_life_tokens=2.0)
    lengths, advantages = np.array([30, 1, 60, 40]), np.array([1.0, -1.0, -0.5, 0.0], np.float32)
    old = -rng.random(lengths.sum()).astype(np.float32)
    drift = rng.standard_normal(lengths.sum()) * rng.choice(
        [0.05, 2.0], lengths.sum()
    )  # calm tokens, and some that bolt
    new = (old + drift).astype(np.float32)
    assert config.dual_clip_ratio is not None
    low, high = influence_bounds(config)
    expected = []
    for end, length, advantage in zip(np.cumsum(lengths), lengths, advantages, strict=True):
        d = (new.astype(np.float64) - old)[end - length : end]
        for t in range(length):
            kept = [d[k] * 2 ** (-(k - t) / 2) for k in range(t, length) if d[k] <= math.log(config.dual_clip_ratio)]
            weight = min(max(math.exp(sum(kept)), low), high)
            is_unsafe = advantage < 0 and math.exp(d[t]) > config.safety_threshold
            expected.append(min(max(weight, 0.8), 1.0) if is_unsafe else weight)
    found = response_influence_weights(new, old, advantages, lengths, config)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len({round(weight, 3) for weight in expected}) > 6


def test_objectives_without_influence_weigh_every_token_by_one():
    logprobs = np.array([-5.0, -0.1], np.float32)
    for objective in ("dapo", "grpo"):
        config = AlgorithmConfig(objective=objective)
        weights = response_influence_weights(logprobs, logprobs[::-1].copy(), np.ones(1), np.array([2]), config)
        assert weights.tolist() == [1.0, 1.0]
