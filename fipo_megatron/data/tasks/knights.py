"""Knights and knaves: a small logic puzzle. Knights always tell the truth, knaves always lie; who is what?

A prompt is what each person says of others: `A:B-;B:A=C;C:A-;?` reads "A says B is a knave, B says A and C are the
same, C says A is a knave" (`/`: the two differ). Exactly one assignment fits. A trace tries the assignments in order,
knights first, and names for each the first person whose words contradict it, or `!` where none does:

    +++A;++-A;+-+B;+--!
    Answer: +--

The base policy overlooks contradictions with `slip_prob`, and so stops too early. Puzzles that differ by the names of
their people alone count as one: all of them are held out, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import numpy as np

from fipo_megatron.config.problems import KnightsTaskConfig
from fipo_megatron.data.tasks.base import ANSWER, HELD_OUT_SEED, Task, Vocabulary, hashes_to_held_out, too_few_held_out

NAMES = "ABCDE"
MAX_DRAWS_PER_PROBLEM = 2000  # without a new held-out puzzle: there is none left


class Statement(NamedTuple):
    """What one person says of one or two others."""

    subject: int
    relation: str  # +: is a knight; -: is a knave; =: is the same as `other`; /: is not
    other: int | None  # after the subject: one spelling a statement

    def holds(self, is_knight: tuple[bool, ...]) -> bool:
        """Whether it is true in this assignment."""
        if self.other is None:
            return is_knight[self.subject] == (self.relation == "+")
        return (is_knight[self.subject] == is_knight[self.other]) == (self.relation == "=")

    def __str__(self) -> str:
        return f"{NAMES[self.subject]}{self.relation}{'' if self.other is None else NAMES[self.other]}"


Puzzle = tuple[Statement, ...]  # the i-th is what person i says


class KnightsTask(Task[Puzzle]):
    """Puzzles with one solution, traces and tokens. Held out are the puzzles whose symmetric forms hash to it."""

    name = "knights"
    vocabulary = Vocabulary(NAMES + "+-=/:;?!\n")

    def __init__(self, config: KnightsTaskConfig) -> None:
        self.config = config
        people = config.num_people
        self.max_prompt_tokens = 6 * people + 1
        self.max_trace_tokens = 2**people * (people + 2) + 2 + people + 1

    def train_problem(self, rng: np.random.Generator) -> Puzzle:
        """A puzzle that is not held out."""
        while True:
            puzzle = self._draw(rng)
            if not hashes_to_held_out(symmetric_form(puzzle), self.config.held_out_frac):
                return puzzle

    def held_out_problems(self, n: int) -> list[Puzzle]:
        """The first `n` of one fixed sequence of held-out puzzles, no two the same but for the names."""
        rng = np.random.default_rng(HELD_OUT_SEED)
        problems: dict[str, Puzzle] = {}  # by symmetric form
        num_draws = 0
        while len(problems) < n:
            puzzle, num_draws = self._draw(rng), num_draws + 1
            form = symmetric_form(puzzle)
            if hashes_to_held_out(form, self.config.held_out_frac) and form not in problems:
                problems[form], num_draws = puzzle, 0
            if num_draws > MAX_DRAWS_PER_PROBLEM:
                raise too_few_held_out(n, len(problems), "task.num_people")
        return list(problems.values())

    def prompt_text(self, problem: Puzzle) -> str:
        """`A:B-;B:A=C;C:A-;?`."""
        return "".join(_line(i, statement) for i, statement in enumerate(problem)) + "?"

    def answer(self, problem: Puzzle) -> str:
        """`+` for a knight and `-` for a knave, in the order of names."""
        (solution,) = solutions(problem)
        return _spell(solution)

    def noisy_trace(self, rng: np.random.Generator, problem: Puzzle) -> str:
        """A trace that takes a wrong assignment for the solution with `slip_prob`, each time it meets one."""
        parts = []
        for assignment in product((True, False), repeat=len(problem)):
            liar = _first_contradiction(problem, assignment)
            if liar is None or rng.random() < self.config.slip_prob:
                break
            parts.append(f"{_spell(assignment)}{NAMES[liar]};")
        return f"{''.join(parts)}{_spell(assignment)}!\n{ANSWER}{_spell(assignment)}"

    def _draw(self, rng: np.random.Generator) -> Puzzle:
        while True:
            puzzle = tuple(_draw_statement(rng, i, self.config.num_people) for i in range(self.config.num_people))
            if len(list(solutions(puzzle))) == 1:
                return puzzle


def solutions(puzzle: Puzzle) -> Iterator[tuple[bool, ...]]:
    """The assignments (True: knight) that contradict no one's words."""
    for assignment in product((True, False), repeat=len(puzzle)):
        if _first_contradiction(puzzle, assignment) is None:
            yield assignment


def symmetric_form(puzzle: Puzzle) -> str:
    """The same text for all puzzles that differ by the names of their people alone: the smallest of all renamings."""
    renamings = zip(*(_renamed_lines(i, statement, len(puzzle)) for i, statement in enumerate(puzzle)), strict=True)
    return min("".join(sorted(lines)) for lines in renamings)


@cache
def _renamed_lines(speaker: int, statement: Statement, num_people: int) -> tuple[str, ...]:
    """What the speaker says under each renaming of the people, in one order of renamings."""
    subject, relation, other = statement
    return tuple(
        _line(names[speaker], _make_statement(relation, names[subject], None if other is None else names[other]))
        for names in permutations(range(num_people))
    )


def _line(speaker: int, statement: Statement) -> str:
    return f"{NAMES[speaker]}:{statement};"


def _make_statement(relation: str, subject: int, other: int | None) -> Statement:
    """`=` and `/` say the same of two people in either order: the first name stands first."""
    if other is None:
        return Statement(subject, relation, None)
    return Statement(min(subject, other), relation, max(subject, other))


def _first_contradiction(puzzle: Puzzle, is_knight: tuple[bool, ...]) -> int | None:
    """The first person who as a knight would lie, or as a knave tell the truth."""
    for person, statement in enumerate(puzzle):
        if statement.holds(is_knight) != is_knight[person]:
            return person
    return None


def _draw_statement(rng: np.random.Generator, speaker: int, num_people: int) -> Statement:
    others = [i for i in range(num_people) if i != speaker]
    relation = "+-=/"[rng.integers(4 if len(others) > 1 else 2)]
    first, *rest = rng.permutation(others).tolist()
    return _make_statement(relation, first, rest[0] if relation in "=/" else None)


def _spell(assignment: tuple[bool, ...]) -> str:
    return "".join("+" if is_knight else "-" for is_knight in assignment)
