"""Rule, format score and penalty add up, accuracy stays apart, and where a rule fails it is told and counted."""

import math
import pickle
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from fipo_megatron.config.schema import RewardConfig
from fipo_megatron.reward import judge
from fipo_megatron.reward.base import CRASHED, NO_ANSWER, TIMED_OUT, UNJUDGED, RewardFunction, Verdict
from fipo_megatron.reward.judge import MAX_FAILURE_CHARS, Reward, make_reward
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


def judge_one(reward: Reward, response: str, num_tokens: int = 5) -> Judgement:
    return reward.judge_many([PROMPT], [response], [num_tokens])[0]


def check_failure(judgement: Judgement, cause: str) -> None:
    """The judgement is a failure that cannot be trained on by mistake, and that says why."""
    assert math.isnan(judgement.reward)
    assert (judgement.accuracy, judgement.prediction) == (0.0, UNJUDGED)
    assert judgement.failure is not None
    assert cause in judgement.failure


@pytest.fixture
def judge_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[RewardFunction], Judgement]:
    def judge_with(rule: RewardFunction) -> Judgement:
        monkeypatch.setitem(judge.RULES, "dapo", rule)
        return judge_one(make_reward(RewardConfig(), max_response_tokens=64), "Answer: 34")

    return judge_with


def test_penalty_lowers_the_reward_and_not_the_accuracy() -> None:
    reward = make_reward(RewardConfig(overlong_buffer_tokens=20, overlong_penalty_factor=0.5), max_response_tokens=100)
    assert judge_one(reward, "Answer: 34", 80) == Judgement(reward=1.0, accuracy=1.0, prediction="34")
    assert judge_one(reward, "Answer: 34", 100) == Judgement(reward=0.5, accuracy=1.0, prediction="34")
    assert judge_one(reward, "Answer: 35", 90) == Judgement(reward=-1.25, accuracy=0.0, prediction="35")


def test_many_are_judged_each_with_its_own_prompt_and_length() -> None:
    reward = make_reward(RewardConfig(overlong_buffer_tokens=20), max_response_tokens=100)
    other = Prompt(uid="train/000008", token_ids=(3,), ground_truth="35", data_source="arithmetic")
    judged = reward.judge_many([PROMPT, other, other], ["Answer: 34", "Answer: 35", "Answer: 34"], [80, 100, 90])
    assert [(judgement.reward, judgement.accuracy) for judgement in judged] == [(1.0, 1.0), (0.0, 1.0), (-1.5, 0.0)]


def test_reward_travels_to_another_process() -> None:
    reward = pickle.loads(pickle.dumps(make_reward(RewardConfig(), max_response_tokens=100)))
    assert judge_one(reward, "Answer: 34").reward == 1.0


def test_buffer_beyond_the_limit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"reward.overlong_buffer_tokens: 101 .*rollout.max_response_tokens = 100; make"
    ):
        make_reward(RewardConfig(overlong_buffer_tokens=101), max_response_tokens=100)


def test_a_rule_that_raises_is_named_with_sample_and_cause(judge_with: Callable[[RewardFunction], Judgement]) -> None:
    def rule(response: str, ground_truth: str) -> Verdict:
        raise KeyError("no such unit")

    check_failure(judge_with(rule), "reward.rule: 'dapo' failed on sample train/000007: KeyError: 'no such unit'")


@pytest.mark.parametrize("verdict", [Verdict(math.nan, 1.0, "34"), Verdict(1.0, math.inf, "34")])
def test_a_number_that_is_not_finite_is_named_with_the_sample(
    verdict: Verdict, judge_with: Callable[[RewardFunction], Judgement]
) -> None:
    judgement = judge_with(lambda response, ground_truth: verdict)
    check_failure(judgement, "'dapo' failed on sample train/000007: it returned")
    check_failure(judgement, "must be a finite number")


@pytest.mark.parametrize(
    ("response", "reward"),
    [("Answer: 34", 1.0), ("Answer: 35", -0.75), ("it is 34", -1.0), ("it is 35", -1.0), ("Answer: [INVALID]", -1.0)],
)
def test_format_score_is_for_a_wrong_answer_that_can_be_read(response: str, reward: float) -> None:
    assert judge_one(make_reward(RewardConfig(format_score=0.25), 64), response).reward == reward


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
        assert judge_one(reward, "35") == Judgement(0.5, 0.0, "35")


@pytest.mark.parametrize(
    ("response", "cause"),
    [
        ("value float('nan')", "it returned nan"),
        ("value float('inf')", "it returned inf"),
        ("value None", "it returned None"),
        ("value '1'", "it returned '1'"),
        ("value 10**400", "it returned 1000"),
        ("value 10**5000", "integer string conversion"),
        ("value {'score': 1.0}", "it returned {'score': 1.0}; the keys must be score, accuracy, prediction"),
        ("raise", "KeyError: 'no such unit'"),
        ("value lambda: 1", "PicklingError"),
    ],
)
def test_a_bad_result_names_sample_function_and_value(custom: RewardConfig, response: str, cause: str) -> None:
    with closing(make_reward(custom, 64)) as reward:
        failed, fine = reward.judge_many([PROMPT] * 2, [response, "34!!"], [5, 5])
    check_failure(failed, f"reward.function: '{custom.function}' failed on sample train/000007: ")
    check_failure(failed, cause)
    assert fine == Judgement(1.0, 1.0, "34!!")


def test_a_failure_is_one_printable_line(judge_with: Callable[[RewardFunction], Judgement]) -> None:
    def rule(response: str, ground_truth: str) -> Verdict:
        raise ValueError("cannot read \x1b[31m\n\u2028\u202e\ud800 caf\xe9" + "x" * 1000)

    failure = judge_with(rule).failure
    assert failure is not None
    assert r"cannot read \x1b[31m\n\u2028\u202e\ud800 café" + "x" in failure
    assert failure.isprintable()
    assert len(failure) == MAX_FAILURE_CHARS


@pytest.mark.parametrize("num_failing", [0, 1, 2, 3, 4])
def test_a_few_failures_are_counted_and_more_end_the_run(num_failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 % of 20 responses in calls of 5: two may fail, the third ends it in the call in which it occurs."""

    def rule(response: str, ground_truth: str) -> Verdict:
        if response in failing:
            raise KeyError(response)
        return Verdict(1.0, 1.0, "")

    failing = [str(i) for i in (3, 8, 11, 12)[:num_failing]]
    monkeypatch.setitem(judge.RULES, "dapo", rule)
    limited = make_reward(RewardConfig(max_unjudged_frac=0.1), 64).with_limit(num_responses=20)
    for start in range(0, 20, 5):
        responses = [str(i) for i in range(start, start + 5)]
        if num_failing > 2 and start == 10:
            number = f"{num_failing} or more of 20 responses"
            with pytest.raises(RuntimeError, match=rf"max_unjudged_frac = 0.1: {number}.*train/000007: KeyError: '3'"):
                limited([PROMPT] * 5, responses, [5] * 5)
            return
        judgements = limited([PROMPT] * 5, responses, [5] * 5)
        assert [judgement.failure is not None for judgement in judgements] == [text in failing for text in responses]
    assert len(limited.failures) == num_failing


def test_nothing_may_fail_where_the_limit_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(judge.RULES, "dapo", lambda response, ground_truth: Verdict(math.nan, 0.0, ""))
    with pytest.raises(RuntimeError, match="1 or more of 1000 responses"):
        make_reward(RewardConfig(max_unjudged_frac=0.0), 64).with_limit(1000)([PROMPT], ["34"], [1])


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
