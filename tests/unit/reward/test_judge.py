"""Rule, format score and penalty add up, accuracy stays apart, and a rule that fails stops the run with a name."""

import math
import pickle
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from fipo_megatron.config.schema import RewardConfig
from fipo_megatron.reward import judge
from fipo_megatron.reward.base import CRASHED, NO_ANSWER, TIMED_OUT, RewardFunction, Verdict
from fipo_megatron.reward.judge import make_reward
from fipo_megatron.types import Judgement, Prompt

PROMPT = Prompt(uid="train/000007", token_ids=(1, 2), ground_truth="34", data_source="arithmetic")
CUSTOM = """
import os, time

def reward(response, ground_truth):
    if response == "hang":
        time.sleep(1000)
    if response == "exit":
        os._exit(1)
    if response.startswith("value "):
        return eval(response.removeprefix("value "))
    if response == "raise":
        raise KeyError("no such unit")
    return {"score": len(response) / 4, "accuracy": float(ground_truth in response), "prediction": response.upper()}
"""


@pytest.fixture
def custom(tmp_path: Path) -> RewardConfig:
    file = tmp_path / "rewards.py"
    file.write_text(CUSTOM)
    return RewardConfig(rule="custom", function=f"{file}:reward", num_workers=1, timeout_s=1.0)


@pytest.fixture
def judge_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[RewardFunction], Judgement]:
    def judge_with(rule: RewardFunction) -> Judgement:
        monkeypatch.setitem(judge.RULES, "dapo", rule)
        return make_reward(RewardConfig(), max_response_tokens=64)(PROMPT, "Answer: 34", 5)

    return judge_with


def test_penalty_lowers_the_reward_and_not_the_accuracy() -> None:
    reward = make_reward(RewardConfig(overlong_buffer_tokens=20, overlong_penalty_factor=0.5), max_response_tokens=100)
    assert reward(PROMPT, "Answer: 34", 80) == Judgement(reward=1.0, accuracy=1.0, prediction="34")
    assert reward(PROMPT, "Answer: 34", 100) == Judgement(reward=0.5, accuracy=1.0, prediction="34")
    assert reward(PROMPT, "Answer: 35", 90) == Judgement(reward=-1.25, accuracy=0.0, prediction="35")


def test_many_are_judged_each_with_its_own_prompt_and_length() -> None:
    reward = make_reward(RewardConfig(overlong_buffer_tokens=20), max_response_tokens=100)
    other = Prompt(uid="train/000008", token_ids=(3,), ground_truth="35", data_source="arithmetic")
    judged = reward.judge_many([PROMPT, other, other], ["Answer: 34", "Answer: 35", "Answer: 34"], [80, 100, 90])
    assert [(judgement.reward, judgement.accuracy) for judgement in judged] == [(1.0, 1.0), (0.0, 1.0), (-1.5, 0.0)]


def test_reward_travels_to_another_process() -> None:
    reward = pickle.loads(pickle.dumps(make_reward(RewardConfig(), max_response_tokens=100)))
    assert reward(PROMPT, "Answer: 34", 5).reward == 1.0


def test_buffer_beyond_the_limit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"reward.overlong_buffer_tokens: 101 .*rollout.max_response_tokens = 100; make"
    ):
        make_reward(RewardConfig(overlong_buffer_tokens=101), max_response_tokens=100)


def test_a_rule_that_raises_is_named_with_sample_and_cause(judge_with: Callable[[RewardFunction], Judgement]) -> None:
    def rule(response: str, ground_truth: str) -> Verdict:
        raise KeyError("no such unit")

    with pytest.raises(RuntimeError, match=r"'dapo' failed on sample train/000007: KeyError: 'no such unit'") as caught:
        judge_with(rule)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("verdict", [Verdict(math.nan, 1.0, "34"), Verdict(1.0, math.inf, "34")])
def test_a_number_that_is_not_finite_is_named_with_the_sample(
    verdict: Verdict, judge_with: Callable[[RewardFunction], Judgement]
) -> None:
    with pytest.raises(RuntimeError, match=r"'dapo' failed on sample train/000007: score .* must be finite"):
        judge_with(lambda response, ground_truth: verdict)


@pytest.mark.parametrize(
    ("response", "reward"),
    [("Answer: 34", 1.0), ("Answer: 35", -0.75), ("it is 34", -1.0), ("it is 35", -1.0), ("Answer: [INVALID]", -1.0)],
)
def test_format_score_is_for_a_wrong_answer_that_can_be_read(response: str, reward: float) -> None:
    assert make_reward(RewardConfig(format_score=0.25), 64)(PROMPT, response, 5).reward == reward


def test_format_score_by_equal_mathematics() -> None:
    config = RewardConfig(rule="math_verify", format_score=0.25, num_workers=1, timeout_s=1.5)
    responses = ["Answer: 68/2", "Answer: 35", "34", "Answer: 9^{9^{9^{9}}}"]
    with closing(make_reward(config, 64)) as reward:
        judged = reward.judge_many([PROMPT] * 4, responses, [5] * 4)
    assert judged == [
        Judgement(1.0, 1.0, "68/2"),
        Judgement(-0.75, 0.0, "35"),
        Judgement(-1.0, 0.0, NO_ANSWER),
        Judgement(-1.0, 0.0, TIMED_OUT),  # no reward for an answer that nobody can judge
    ]


def test_a_custom_function_judges_in_processes_that_may_be_lost(custom: RewardConfig) -> None:
    responses = ["hang", "34!!", "exit", "value 0.5", "value -0.5"]
    with closing(make_reward(custom, 64)) as reward:
        assert reward.judge_many([PROMPT] * 5, responses, [5] * 5) == [
            Judgement(-1.0, 0.0, TIMED_OUT),
            Judgement(1.0, 1.0, "34!!"),
            Judgement(-1.0, 0.0, CRASHED),
            Judgement(0.5, 1.0, ""),
            Judgement(-0.5, 0.0, ""),
        ]
        assert reward(PROMPT, "35", 5) == Judgement(0.5, 0.0, "35")


@pytest.mark.parametrize(
    ("response", "cause"),
    [
        ("value float('nan')", "it returned nan"),
        ("value float('inf')", "it returned inf"),
        ("value None", "it returned None"),
        ("value '1'", "it returned '1'"),
        ("value {'score': 1.0}", "it returned {'score': 1.0}; the keys must be score, accuracy, prediction"),
        ("raise", "KeyError: 'no such unit'"),
        ("value lambda: 1", "PicklingError"),
    ],
)
def test_a_bad_result_names_sample_function_and_value(custom: RewardConfig, response: str, cause: str) -> None:
    where = f"reward.function: '{custom.function}' failed on sample train/000007: "
    with (
        closing(make_reward(custom, 64)) as reward,
        pytest.raises(RuntimeError, match=re.escape(where) + ".*" + re.escape(cause)),
    ):
        reward(PROMPT, response, 5)


def test_a_custom_function_is_checked_before_a_process_starts(tmp_path: Path) -> None:
    children = len(psutil.Process().children())
    with pytest.raises(ValueError, match=r"reward.function: .*cannot read .*none.py: No such file"):
        make_reward(RewardConfig(rule="custom", function=f"{tmp_path}/none.py:reward"), 64)
    assert len(psutil.Process().children()) == children


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rule": "custom"}, "reward.function = null: the custom rule needs one"),
        ({"function": "a.py:f"}, r"reward.function = 'a.py:f': has no effect with reward.rule = 'dapo'"),
        ({"rule": "custom", "function": "a.py:f", "format_score": 0.5}, "reward.format_score = 0.5: has no effect"),
        ({"format_score": 2.0}, "less than 2"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        RewardConfig(**values)
