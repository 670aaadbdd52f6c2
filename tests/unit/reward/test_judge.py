"""Score and penalty add up, accuracy stays apart, and a rule that fails stops the run with a name."""

import pickle

import pytest

from fipo_megatron.config.schema import RewardConfig
from fipo_megatron.reward.base import RewardFunction, Verdict
from fipo_megatron.reward.judge import judge, make_reward
from fipo_megatron.types import Judgement, Prompt

PROMPT = Prompt(uid="train/000007", token_ids=(1, 2), ground_truth="34", data_source="arithmetic")


def judge_with(rule: RewardFunction) -> Judgement:
    return judge(PROMPT, "Answer: 34", 5, config=RewardConfig(), rule=rule, max_response_tokens=64)


def test_penalty_lowers_the_reward_and_not_the_accuracy() -> None:
    reward = make_reward(RewardConfig(overlong_buffer_tokens=20, overlong_penalty_factor=0.5), max_response_tokens=100)
    assert reward(PROMPT, "Answer: 34", 80) == Judgement(reward=1.0, accuracy=1.0, prediction="34")
    assert reward(PROMPT, "Answer: 34", 100) == Judgement(reward=0.5, accuracy=1.0, prediction="34")
    assert reward(PROMPT, "Answer: 35", 90) == Judgement(reward=-1.25, accuracy=0.0, prediction="35")


def test_reward_travels_to_another_process() -> None:
    reward = pickle.loads(pickle.dumps(make_reward(RewardConfig(), max_response_tokens=100)))
    assert reward(PROMPT, "Answer: 34", 5).reward == 1.0


def test_buffer_beyond_the_limit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"reward.overlong_buffer_tokens: 101 .*rollout.max_response_tokens = 100; make"
    ):
        make_reward(RewardConfig(overlong_buffer_tokens=101), max_response_tokens=100)


def test_a_rule_that_raises_is_named_with_sample_and_cause() -> None:
    def rule(response: str, ground_truth: str) -> Verdict:
        raise KeyError("no such unit")

    with pytest.raises(RuntimeError, match=r"'dapo' failed on sample train/000007: KeyError: 'no such unit'") as caught:
        judge_with(rule)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("verdict", [Verdict(float("nan"), 1.0, "34"), Verdict(1.0, float("inf"), "34")])
def test_a_number_that_is_not_finite_is_named_with_the_sample(verdict: Verdict) -> None:
    with pytest.raises(RuntimeError, match=r"'dapo' failed on sample train/000007: score .* must be finite"):
        judge_with(lambda response, ground_truth: verdict)
