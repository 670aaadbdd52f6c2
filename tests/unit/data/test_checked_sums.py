"""Traces are parsed and recomputed with Python's own addition."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fipo_megatron.config.problems import ArithmeticTaskConfig, CheckedSumsTaskConfig
from fipo_megatron.data.tasks.arithmetic import Addition, ArithmeticTask
from fipo_megatron.data.tasks.checked_sums import CheckedSumsTask


def make_task(**settings: float) -> CheckedSumsTask:
    return CheckedSumsTask(CheckedSumsTaskConfig(**settings))


def test_traces_are_written_as_documented() -> None:
    task, problem = make_task(), Addition(7345, 5128)
    assert task.prompt_text(problem) == "7345+5128="
    assert task.answer(problem) == "12473"
    first = "5+8=13;4+2=06;3+1=04;7+5=12;"
    assert task.trace(problem, checks=False) == f"{first}\nAnswer: 12463"
    assert task.trace(problem, checks=True) == f"{first}?13+0=13;06+1=07;04+0=04;12+0=12;\nAnswer: 12473"


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(2, 12))
def test_a_check_makes_every_answer_right_and_nothing_else_those_with_carries(
    data: st.DataObject, num_digits: int
) -> None:
    operand = st.integers(10 ** (num_digits - 1), 10**num_digits - 1)
    a, b = data.draw(operand), data.draw(operand)
    task = make_task(num_digits=num_digits)
    checked, unchecked = (task.trace(Addition(a, b), checks).split("Answer: ")[1] for checks in (True, False))
    assert checked == str(a + b)
    carries = [(a % 10**place + b % 10**place) >= 10**place for place in range(1, num_digits)]
    assert (unchecked == str(a + b)) == (not any(carries))


def test_a_wrong_first_sum_is_carried_on() -> None:
    trace = make_task(num_digits=2).trace(Addition(15, 26), checks=True, wrong_sums=[4, None])
    assert trace == "5+6=04;1+2=03;?04+0=04;03+0=03;\nAnswer: 34"


def test_base_policy_checks_and_slips_at_the_configured_rates() -> None:
    task, rng = make_task(check_prob=0.2, digit_error_prob=0.1), np.random.default_rng(0)
    traces = [task.noisy_trace(rng, task.train_problem(rng)) for _ in range(3000)]
    assert abs(np.mean(["?" in trace for trace in traces]) - 0.2) < 4 * (0.16 / 3000) ** 0.5
    columns = [
        tuple(map(int, column)) for trace in traces for column in re.findall(r"(\d)\+(\d)=(\d\d)", trace.split("?")[0])
    ]
    assert len(columns) == 4 * 3000
    share_wrong = np.mean([x + y != total for x, y, total in columns])
    assert share_wrong == pytest.approx(0.1 * 18 / 19, abs=4 * (0.09 / 12_000) ** 0.5)  # a random sum may be right


@pytest.mark.parametrize("num_digits", [2, 4, 12])
def test_token_limits_are_those_of_the_longest_problem(num_digits: int) -> None:
    task, largest = make_task(num_digits=num_digits), 10**num_digits - 1
    problem, encode = Addition(largest, largest), task.vocabulary.encode
    assert task.max_prompt_tokens == len(encode(task.prompt_text(problem)))
    assert task.max_trace_tokens == len(encode(task.trace(problem, checks=True))) + 1  # end of sequence


def test_problems_and_split_are_those_of_the_arithmetic_task() -> None:
    arithmetic = ArithmeticTask(ArithmeticTaskConfig())
    assert make_task().held_out_problems(100) == arithmetic.held_out_problems(100)
