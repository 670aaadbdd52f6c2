"""Chains are evaluated by Python itself, one operation after the other."""

import re

import numpy as np
import pytest

from fipo_megatron.config.schema import ChainTaskConfig
from fipo_megatron.data.tasks.chain import Chain, ChainTask, Operation

EXAMPLE = Chain(
    4,
    (
        (Operation("+", 7), Operation("*", 3)),
        (Operation("-", 6), Operation("*", 9)),
        (Operation("+", 8), Operation("-", 5)),
    ),
)


def value_of(prompt: str) -> int:
    """By eval, left to right, of the unlabelled prompt."""
    operations = re.findall(r"[-+*]\d", prompt)
    value = int(prompt[0])
    for operation in operations:
        value = eval(f"{value}{operation}")
    return value % 10


def test_prompt_and_traces_are_written_as_documented() -> None:
    task = ChainTask(ChainTaskConfig(num_groups=3))
    assert task.prompt_text(EXAMPLE) == "4a+7*3b-6*9c+8-5="
    # 4+7=11, *3=33 -> 3; -6=-3 -> 7, *9=63 -> 3; +8=11, -5=6
    assert task.answer(EXAMPLE) == "6"
    assert task.trace(EXAMPLE, [True, False, True]) == "a4+7=1*3=3;b;c3+8=1-5=6;\nAnswer: 6"
    assert task.trace(EXAMPLE, [False, False, False]) == "a;b;c;\nAnswer: 6"


@pytest.mark.parametrize(("num_groups", "operations_per_group"), [(1, 1), (5, 2), (12, 4)])
def test_traces_are_right_and_as_long_as_announced(num_groups: int, operations_per_group: int) -> None:
    config = ChainTaskConfig(num_groups=num_groups, operations_per_group=operations_per_group)
    task, rng = ChainTask(config), np.random.default_rng(0)
    for _ in range(100):
        problem = task.train_problem(rng)
        prompt = task.prompt_text(problem)
        assert task.answer(problem) == str(value_of(prompt))
        trace = task.trace(problem, [True] * num_groups)
        for before, operation, after in re.findall(r"(?=(\d)([-+*]\d)=(\d))", trace):
            assert eval(f"{before}{operation}") % 10 == int(after)
        assert trace.endswith(f"\nAnswer: {value_of(prompt)}")
        assert len(task.vocabulary.encode(prompt)) == task.max_prompt_tokens
        assert len(task.vocabulary.encode(trace)) + 1 == task.max_trace_tokens


def test_base_policy_works_groups_on_paper_at_the_configured_rate() -> None:
    task, rng = ChainTask(ChainTaskConfig(paper_prob=0.3)), np.random.default_rng(0)
    traces = [task.noisy_trace(rng, task.train_problem(rng)) for _ in range(2000)]
    num_worked = sum(len(re.findall(r"[a-e]\d", trace)) for trace in traces)
    assert abs(num_worked / 10_000 - 0.3) < 4 * (0.21 / 10_000) ** 0.5


def test_operations_lose_nothing() -> None:
    task, rng = ChainTask(ChainTaskConfig()), np.random.default_rng(0)
    operations = {operation for _ in range(300) for group in task.train_problem(rng).groups for operation in group}
    assert len(operations) == 9 + 9 + 3
    for operation in operations:
        assert {operation.apply(value) for value in range(10)} == set(range(10))
