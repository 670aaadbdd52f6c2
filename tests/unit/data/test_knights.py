"""Puzzles are solved again from their texts, by trying all assignments."""

import re
from itertools import product

import numpy as np
import pytest

from fipo_megatron.config.schema import KnightsTaskConfig
from fipo_megatron.data.tasks.knights import KnightsTask, Statement


def solve(prompt: str) -> list[str]:
    statements = re.findall(r"([A-E]):([A-E])([-+=/])([A-E]?);", prompt)
    assert "".join(f"{speaker}:{a}{relation}{b};" for speaker, a, relation, b in statements) + "?" == prompt
    found = []
    for kinds in product("+-", repeat=len(statements)):
        kind = dict(zip("ABCDE", kinds, strict=False))
        truths = {
            speaker: (kind[a] == relation if not b else (kind[a] == kind[b]) == (relation == "="))
            for speaker, a, relation, b in statements
        }
        if all(truths[speaker] == (kind[speaker] == "+") for speaker in truths):
            found.append("".join(kinds))
    return found


def test_puzzle_is_written_as_documented() -> None:
    task = KnightsTask(KnightsTaskConfig(slip_prob=0))
    puzzle = (Statement(1, "-", None), Statement(0, "=", 2), Statement(0, "-", None))
    assert task.prompt_text(puzzle) == "A:B-;B:A=C;C:A-;?"
    # +++, ++-: the knight A calls the knight B a knave. +-+: the knave B rightly says that A is as C. +--: all fits.
    assert task.answer(puzzle) == "+--"
    assert task.noisy_trace(np.random.default_rng(0), puzzle) == "+++A;++-A;+-+B;+--!\nAnswer: +--"


@pytest.mark.parametrize("num_people", [3, 4, 5])
def test_every_puzzle_has_one_solution(num_people: int) -> None:
    task, rng = KnightsTask(KnightsTaskConfig(num_people=num_people, slip_prob=0)), np.random.default_rng(0)
    problems = [task.train_problem(rng) for _ in range(100)]
    for problem in problems:
        prompt = task.prompt_text(problem)
        assert solve(prompt) == [task.answer(problem)]
        trace = task.noisy_trace(rng, problem)
        assert trace.endswith(f"{task.answer(problem)}!\nAnswer: {task.answer(problem)}")
        assert len(task.vocabulary.encode(prompt)) <= task.max_prompt_tokens
        assert len(task.vocabulary.encode(trace)) + 1 <= task.max_trace_tokens


def test_slips_stop_at_a_wrong_assignment_at_the_configured_rate() -> None:
    task, rng = KnightsTask(KnightsTaskConfig(slip_prob=0.2, num_people=3)), np.random.default_rng(0)
    num_met = num_slips = 0
    for _ in range(3000):
        problem = task.train_problem(rng)
        trace = task.noisy_trace(rng, problem)
        is_wrong = not trace.endswith(task.answer(problem))
        num_met += trace.count(";") + is_wrong
        num_slips += is_wrong
    assert abs(num_slips / num_met - 0.2) < 4 * (0.16 / num_met) ** 0.5


def test_more_problems_than_there_are_is_refused() -> None:
    task = KnightsTask(KnightsTaskConfig(num_people=3))
    with pytest.raises(ValueError, match=r"evaluation.num_problems: 500 is more than .* task.num_people"):
        task.held_out_problems(500)
