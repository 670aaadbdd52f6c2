"""Puzzles are solved again from their texts, by trying all assignments."""

import re
from collections.abc import Iterator
from itertools import combinations, permutations, product

import numpy as np
import pytest

from fipo_megatron.config.problems import KnightsTaskConfig
from fipo_megatron.data.tasks.knights import KnightsTask, Statement, symmetric_form


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


def every_puzzle(num_people: int) -> Iterator[str]:
    """The prompts of all puzzles with one solution."""
    people = "ABCDE"[:num_people]
    said = [
        [f"{speaker}:{a}{relation};" for a in people for relation in "+-" if a != speaker]
        + [f"{speaker}:{a}{relation}{b};" for a, b in combinations(people.replace(speaker, ""), 2) for relation in "=/"]
        for speaker in people
    ]
    return (prompt for lines in product(*said) if len(solve(prompt := "".join(lines) + "?")) == 1)


def smallest_renaming(prompt: str) -> tuple[str, ...]:
    """By replacement in the text; `B=A` is written `A=B`."""
    people = re.findall("([A-E]):", prompt)
    renamings = []
    for names in permutations(people):
        renamed = prompt.translate(str.maketrans("".join(people), "".join(names)))
        renamed = re.sub("([A-E])([=/])([A-E])", lambda m: m[2].join(sorted((m[1], m[3]))), renamed)
        renamings.append(tuple(sorted(renamed.rstrip("?;").split(";"))))
    return min(renamings)


def parse(prompt: str) -> tuple[Statement, ...]:
    index = {"": None, **{name: i for i, name in enumerate("ABCDE")}}
    said = re.findall("[A-E]:([A-E])([-+=/])([A-E]?);", prompt)
    return tuple(Statement(index[a], relation, index[b]) for a, relation, b in said)


@pytest.mark.parametrize(("num_people", "num_different"), [(3, 14), (4, 314)])
def test_the_symmetric_form_tells_puzzles_apart_but_for_names(num_people: int, num_different: int) -> None:
    forms: dict[tuple[str, ...], set[str]] = {}
    for prompt in every_puzzle(num_people):
        forms.setdefault(smallest_renaming(prompt), set()).add(symmetric_form(parse(prompt)))
    assert len(forms) == num_different  # as the schema says
    assert all(len(mine) == 1 for mine in forms.values())
    assert len(set.union(*forms.values())) == num_different


@pytest.mark.parametrize(("num_people", "num_held_out"), [(3, 3), (4, 60)])
def test_train_and_held_out_puzzles_differ_by_more_than_names(num_people: int, num_held_out: int) -> None:
    task = KnightsTask(KnightsTaskConfig(num_people=num_people, held_out_frac=0.3))
    held_out = {smallest_renaming(task.prompt_text(puzzle)) for puzzle in task.held_out_problems(num_held_out)}
    assert len(held_out) == num_held_out
    rng = np.random.default_rng(0)
    drawn = {task.prompt_text(task.train_problem(rng)) for _ in range(1500)}
    assert held_out.isdisjoint(map(smallest_renaming, drawn))


def test_a_statement_has_one_spelling() -> None:
    task, rng = KnightsTask(KnightsTaskConfig(num_people=5)), np.random.default_rng(0)
    pairs = re.findall("([A-E])[=/]([A-E])", "".join(task.prompt_text(task.train_problem(rng)) for _ in range(200)))
    assert len(pairs) > 100
    assert all(first < second for first, second in pairs)
