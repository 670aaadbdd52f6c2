"""Chains of operations modulo 10: a task in which length pays.

A prompt is a digit and labelled groups of operations, `4a+7*3b-6*9c+8-5=`, applied from left to right, modulo 10. A
trace takes the groups in order. Each is either worked on paper, from the digit reached so far, or done in the head:

    a4+7=1*3=3;b;c1+8=9-5=4;
    Answer: 4

On paper every operation is one that a tiny policy gets right; in the head it has to do the whole group between two
tokens, and several in a row if it leaves out several. So each group that is worked raises accuracy and costs tokens,
and how many to work is the policy's choice, group by group. The base policy works a share `paper_prob` of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fipo_megatron.config.schema import ChainTaskConfig
from fipo_megatron.data.tasks.base import ANSWER, HELD_OUT_SEED, Task, Vocabulary, hashes_to_held_out

LABELS = "abcdefghijkl"
UNITS = (3, 7, 9)  # factors modulo 10 that lose nothing: every operation maps the ten digits one to one


class Operation(NamedTuple):
    """One step of a chain."""

    symbol: str  # + - *
    operand: int

    def apply(self, value: int) -> int:
        """The digit after the operation."""
        result = {"+": value + self.operand, "-": value - self.operand, "*": value * self.operand}[self.symbol]
        return result % 10


class Chain(NamedTuple):
    """A digit and the groups of operations that are applied to it."""

    start: int
    groups: tuple[tuple[Operation, ...], ...]


class ChainTask(Task[Chain]):
    """Problems, traces and tokens of chains. Held out are the problems whose prompts hash to it."""

    name = "chain"
    vocabulary = Vocabulary("0123456789+-*=;\n" + LABELS)

    def __init__(self, config: ChainTaskConfig) -> None:
        self.config = config
        num_operations = config.num_groups * config.operations_per_group
        self.max_prompt_tokens = 2 + config.num_groups + 2 * num_operations  # start, `=`, labels, operations
        # Label, digit and `;` a group, `+7=1` an operation; newline, `Answer: `, digit, end of sequence.
        self.max_trace_tokens = 3 * config.num_groups + 4 * num_operations + 4

    def train_problem(self, rng: np.random.Generator) -> Chain:
        """A chain that is not held out."""
        return self._draw(rng, held_out=False)

    def held_out_problems(self, n: int) -> list[Chain]:
        """The first `n` of one fixed sequence of distinct held-out chains."""
        rng = np.random.default_rng(HELD_OUT_SEED)
        problems: dict[Chain, None] = {}
        while len(problems) < n:  # there are 24 ** operations of them, more than anyone asks for
            problems[self._draw(rng, held_out=True)] = None
        return list(problems)

    def prompt_text(self, problem: Chain) -> str:
        """`4a+7*3b-6*9=`."""
        groups = (
            label + "".join(f"{operation.symbol}{operation.operand}" for operation in group)
            for label, group in zip(LABELS, problem.groups, strict=False)
        )
        return f"{problem.start}{''.join(groups)}="

    def answer(self, problem: Chain) -> str:
        """The digit at the end of the chain."""
        value = problem.start
        for group in problem.groups:
            for operation in group:
                value = operation.apply(value)
        return str(value)

    def noisy_trace(self, rng: np.random.Generator, problem: Chain) -> str:
        """A right trace that works each group on paper with `paper_prob`."""
        return self.trace(problem, (rng.random(len(problem.groups)) < self.config.paper_prob).tolist())

    def trace(self, problem: Chain, on_paper: list[bool]) -> str:
        """The right trace that works these groups on paper, without end of sequence."""
        value, parts = problem.start, []
        for label, group, is_worked in zip(LABELS, problem.groups, on_paper, strict=False):
            work = str(value)
            for operation in group:
                value = operation.apply(value)
                work += f"{operation.symbol}{operation.operand}={value}"
            parts.append(f"{label}{work if is_worked else ''};")
        return "".join(parts) + "\n" + ANSWER + str(value)

    def _draw(self, rng: np.random.Generator, held_out: bool) -> Chain:
        while True:
            chain = Chain(
                start=int(rng.integers(10)),
                groups=tuple(
                    tuple(_draw_operation(rng) for _ in range(self.config.operations_per_group))
                    for _ in range(self.config.num_groups)
                ),
            )
            if hashes_to_held_out(self.prompt_text(chain), self.config.held_out_frac) == held_out:
                return chain


def _draw_operation(rng: np.random.Generator) -> Operation:
    symbol = "+-*"[rng.integers(3)]
    return Operation(symbol, int(rng.choice(UNITS)) if symbol == "*" else int(rng.integers(1, 10)))
