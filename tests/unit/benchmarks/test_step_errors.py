"""Errors of a step and their limits, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from fipo_megatron.benchmarks.step_errors import (
    Errors,
    StepResults,
    describe,
    exact_limits,
    gradient_errors,
    rounded_limits,
    share_of_limits,
)


def tensors(**values):
    return {name: torch.tensor(of_name) for name, of_name in values.items()}


EXACT = tensors(a=[3.0, -4.0], b=[0.5])


@pytest.mark.parametrize(
    ("found", "order", "whole", "parameter"),
    [
        (tensors(a=[3.0, -4.0], b=[0.5]), 2, 0.0, 0.0),
        (tensors(a=[3.0, -4.0], b=[0.7]), 2, 0.2 / math.sqrt(25.25), 0.4),
        (tensors(a=[3.3, -4.4], b=[0.5]), 2, 0.5 / math.sqrt(25.25), 0.1),
        (tensors(a=[3.3, -4.4], b=[0.7]), 2, math.sqrt(0.25 + 0.04) / math.sqrt(25.25), 0.4),
        (tensors(a=[3.0, -4.0], b=[0.7]), math.inf, 0.2 / 4, 0.4),
        (tensors(a=[3.8, -4.4], b=[0.5]), math.inf, 0.8 / 4, 0.8 / 4),
    ],
)
def test_gradients_as_one_and_the_worst_parameters(found, order, whole, parameter):
    assert gradient_errors(found, EXACT, order) == pytest.approx((whole, parameter), abs=1e-6)


def test_gradients_that_are_rounding_not_a_number_or_missing():
    exact = tensors(a=[2.0], b=[0.0])
    assert gradient_errors(tensors(a=[2.0], b=[1e-7]), exact)[1] == pytest.approx(0.05)  # of a millionth of 2
    assert np.isnan(gradient_errors(tensors(a=[np.nan], b=[0.0]), exact)).all()
    with pytest.raises(ValueError, match=r"gradients of \['b'\] are on one side alone"):
        gradient_errors(tensors(a=[2.0]), exact)


def test_results_are_compared_in_all_their_parts():
    exact = StepResults(np.array([-1.0, -2.0]), 0.5, EXACT)
    found = StepResults(np.array([-1.0, -2.25]), 0.625, tensors(a=[3.0, -4.0], b=[0.75]))
    assert found.errors(exact, math.inf) == pytest.approx((0.25, 0.25 / 4, 0.5))
    assert found.abs_error(exact) == 0.25
    assert StepResults(exact.logprobs, 1.5, EXACT).value_error(exact) == 1.0
    assert np.isnan(StepResults(np.array([np.nan, 0.0]), 0.5, EXACT).value_error(exact))
    assert describe(Errors(0.25, 0.0625, 0.5)) == (
        "log-probs and loss off by 2.5e-01, gradients by 6.2e-02, the worst parameter's by 5.0e-01"
    )


def test_16_bits_may_be_half_as_far_again_as_the_plain_loop():
    limits = rounded_limits(Errors(0.1, 0.02, 0.2), torch.bfloat16)
    assert limits == pytest.approx((0.15, 0.03, 0.3))
    assert share_of_limits(Errors(0.15, 0.015, 0.27), limits) == pytest.approx(1.0)
    assert share_of_limits(Errors(0.0, 0.06, 0.0), limits) == pytest.approx(2.0)
    # Of a plain loop that is exact: one rounding of 8 bits, 2^-8, half as much again.
    assert rounded_limits(Errors(0.0, 0.0, 0.0), torch.bfloat16) == (1.5 / 256,) * 3
    assert np.isnan(share_of_limits(Errors(0.0, 0.0, np.nan), limits))
    assert np.isnan(rounded_limits(Errors(0.0, np.nan, 0.0), torch.bfloat16).gradient)


def test_float32_may_be_off_by_a_ten_thousandth():
    assert share_of_limits(Errors(5e-5, 0.0, 1e-4), exact_limits()) == pytest.approx(1.0)
