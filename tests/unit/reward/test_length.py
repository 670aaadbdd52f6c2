"""The penalty at the corners of its ramp, computed by hand."""

import pytest

from fipo_megatron.reward.length import overlong_penalty


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.025), (90, -0.25), (100, -0.5), (104, -0.6)]
)
def test_ramp(num_tokens: int, penalty: float) -> None:
    assert overlong_penalty(num_tokens, max_response_tokens=100, buffer_tokens=20, factor=0.5) == pytest.approx(penalty)


def test_no_buffer_is_no_penalty() -> None:
    assert overlong_penalty(100, max_response_tokens=100, buffer_tokens=0, factor=1.0) == 0.0
