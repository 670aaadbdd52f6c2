"""Traces are recomputed with Python's own addition; the split is enumerated; the saved tokenizer is loaded back."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fipo_megatron.config.problems import ArithmeticTaskConfig
from fipo_megatron.data.tasks.arithmetic import Addition, ArithmeticTask

COLUMN = re.compile(r"(\d)\+(\d)\+(\d)=(\d\d);")


def make_task(**settings: float) -> ArithmeticTask:
    return ArithmeticTask(ArithmeticTaskConfig(**settings))


def parse(trace: str) -> tuple[list[tuple[int, ...]], str]:
    """Columns (x, y, carry in, sum), rightmost first, and the answer; every character must be accounted for."""
    columns, answer = trace.split("\nAnswer: ")
    found = COLUMN.findall(columns)
    assert "".join(f"{x}+{y}+{c}={t};" for x, y, c, t in found) == columns
    return [tuple(map(int, column)) for column in found], answer


def test_worked_trace_is_written_as_documented() -> None:
    task = make_task()
    assert task.prompt_text(Addition(7345, 5128)) == "7345+5128="
    assert task.worked_trace(Addition(7345, 5128)) == "5+8+0=13;4+2+1=07;3+1+0=04;7+5+0=12;\nAnswer: 12473"
    assert task.worked_trace(Addition(1000, 2000)).endswith("\nAnswer: 3000")


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(2, 12))
def test_worked_trace_adds_as_python_does(data: st.DataObject, num_digits: int) -> None:
    operand = st.integers(10 ** (num_digits - 1), 10**num_digits - 1)
    a, b = data.draw(operand), data.draw(operand)
    columns, answer = parse(make_task(num_digits=num_digits).worked_trace(Addition(a, b)))
    assert answer == str(a + b)
    assert len(columns) == num_digits
    for place, (x, y, carry, total) in enumerate(columns):
        unit = 10**place
        assert (x, y) == (a // unit % 10, b // unit % 10)
        assert carry == (a % unit + b % unit) // unit
        assert total == x + y + carry


def test_noisy_trace_without_noise_is_the_worked_trace() -> None:
    task, rng = make_task(carry_error_prob=0, digit_error_prob=0), np.random.default_rng(0)
    for a, b in [(9999, 9999), (1000, 1000), (4567, 6789)]:
        assert task.noisy_trace(rng, Addition(a, b)) == task.worked_trace(Addition(a, b))


def test_noisy_trace_errs_at_the_configured_rates_and_agrees_with_itself() -> None:
    task, rng = make_task(carry_error_prob=0.6, digit_error_prob=0.1), np.random.default_rng(0)
    num_traces, num_carries, num_forgotten = 3000, 0, 0
    wrong_sums: list[int] = []
    for _ in range(num_traces):
        a, b = rng.integers(1000, 10000, size=2).tolist()
        columns, answer = parse(task.noisy_trace(rng, Addition(a, b)))
        assert [x for x, *_ in columns] == [int(d) for d in reversed(str(a))]
        assert [y for _, y, *_ in columns] == [int(d) for d in reversed(str(b))]
        assert columns[0][2] == 0
        wrong_sums += [total for x, y, c, total in columns if x + y + c != total]
        digits = "".join(str(total % 10) for *_, total in reversed(columns))
        assert answer in (digits, "1" + digits)
        carries_read = [column[2] for column in columns[1:]] + [len(answer) - len(digits)]
        for (*_, total), carry in zip(columns, carries_read, strict=True):
            assert carry in (0, total // 10)
            num_carries += total >= 10
            num_forgotten += total >= 10 and carry == 0
    assert abs(num_forgotten / num_carries - 0.6) < 4 * (0.24 / num_carries) ** 0.5
    # A random sum of 0..19 is right by chance once in 20.
    assert abs(len(wrong_sums) / (4 * num_traces) - 0.1 * 19 / 20) < 4 * (0.09 / (4 * num_traces)) ** 0.5
    assert set(wrong_sums) == set(range(20))


def test_default_noise_puts_the_most_likely_answer_wrong_when_carries_are_needed() -> None:
    task, rng = make_task(), np.random.default_rng(0)
    traces = [task.noisy_trace(rng, Addition(5678, 6789)) for _ in range(300)]
    num_right = sum(trace == task.worked_trace(Addition(5678, 6789)) for trace in traces)
    assert num_right < max(traces.count(trace) for trace in set(traces))


@pytest.mark.parametrize("num_digits", [2, 3])
def test_split_is_by_value_exact_and_the_same_for_every_seed(num_digits: int) -> None:
    task = make_task(num_digits=num_digits, held_out_frac=0.1)
    everything = set(range(10 ** (num_digits - 1), 10**num_digits))
    held_out = {operand for problem in task.held_out_problems(len(everything) // 20) for operand in problem}
    train: set[int] = set()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        train |= {operand for _ in range(4000) for operand in task.train_problem(rng)}
    assert held_out
    assert not held_out & train
    assert len(train) == round(0.9 * len(everything))
    assert held_out <= everything - train


def test_held_out_operands_are_spread_over_magnitude_and_last_digit() -> None:
    operands = {operand for problem in make_task().held_out_problems(20_000) for operand in problem}
    assert len(operands) == 900
    assert np.bincount([operand % 10 for operand in operands]).tolist() == [90] * 10
    assert all(95 <= n <= 105 for n in np.bincount([operand // 1000 for operand in operands])[1:])


def test_held_out_problems_are_fixed_and_distinct() -> None:
    problems = make_task().held_out_problems(512)
    assert len(set(problems)) == 512
    assert problems == make_task().held_out_problems(1024)[:512]
    # Published numbers refer to these problems: they must not change unnoticed.
    assert problems[:3] == [(1249, 9156), (7734, 3587), (6001, 7810)]


def test_a_split_that_is_too_small_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"evaluation.num_problems: 82 is more than the 81 .* raise task.held_out_frac"
    ):
        make_task(num_digits=2).held_out_problems(82)
    assert len(make_task(num_digits=2).held_out_problems(81)) == 81
    with pytest.raises(ValueError, match=r"task.held_out_frac: 0.001 .* use 0.011 or more"):
        make_task(num_digits=2, held_out_frac=0.001)


@pytest.mark.parametrize("num_digits", [2, 4, 12])
def test_token_limits_are_those_of_the_longest_problem(num_digits: int) -> None:
    task, largest = make_task(num_digits=num_digits), 10**num_digits - 1
    prompt_tokens = len(task.vocabulary.encode(task.prompt_text(Addition(largest, largest))))
    response_tokens = len(task.vocabulary.encode(task.worked_trace(Addition(largest, largest)))) + 1  # end of sequence
    assert (task.max_prompt_tokens, task.max_trace_tokens) == (prompt_tokens, response_tokens)
    task.check_limits(prompt_tokens, response_tokens)
    with pytest.raises(
        ValueError, match=rf"rollout.max_prompt_tokens: {prompt_tokens - 1} .* set it to {prompt_tokens}"
    ):
        task.check_limits(prompt_tokens - 1, response_tokens)
    with pytest.raises(ValueError, match=rf"rollout.max_response_tokens: .* set it to {response_tokens}"):
        task.check_limits(prompt_tokens, response_tokens - 1)
