"""The rules that ship fit the interface."""

import inspect

from fipo_megatron.reward.base import RewardFunction, Verdict
from fipo_megatron.reward.judge import RULES


def test_rules_take_response_and_ground_truth_and_return_a_verdict() -> None:
    expected = list(inspect.signature(RewardFunction.__call__).parameters)[1:]
    for rule in RULES.values():
        assert list(inspect.signature(rule).parameters) == expected
        assert rule("Answer: 34", "34") == Verdict(score=1.0, accuracy=1.0, prediction="34")
