"""Multi-digit addition with worked traces: a task that a tiny policy can learn in minutes on a CPU.

A prompt is `7345+5128=`. Its worked trace adds column by column from the right, each as digit + digit + carry =
two-digit sum, and ends with the line that the reward reads:

    5+8+0=13;4+2+1=07;3+1+0=04;7+5+0=12;
    Answer: 12473
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fipo_megatron.config.problems import ArithmeticTaskConfig
from fipo_megatron.data.tasks.base import ANSWER, HELD_OUT_SEED, Task, Vocabulary, too_few_held_out

GOLDEN_RATIO_CONJUGATE = (math.sqrt(5) - 1) / 2


class Addition(NamedTuple):
    """Two operands to add."""

    a: int
    b: int


class AdditionTask(Task[Addition]):
    """Two operands to add. Of the operands' values in a fixed order the first are held out, the others for training."""

    def __init__(self, num_digits: int, held_out_frac: float) -> None:
        self.max_prompt_tokens = 2 * num_digits + 2  # the operands, `+` and `=`
        self._smallest: int = 10 ** (num_digits - 1)
        self._num_values: int = 9 * self._smallest
        self._num_held_out = round(self._num_values * held_out_frac)
        if self._num_held_out == 0:
            raise ValueError(
                f"task.held_out_frac: {held_out_frac} of {self._num_values} operands leaves none to "
                f"evaluate on; use {1 / self._num_values:.2g} or more, or raise task.num_digits ({num_digits})"
            )
        # The order is that of multiples of the golden ratio modulo the number of values: every stretch of it is spread
        # evenly over magnitudes and last digits, so held-out operands are as hard as those of training.
        self._stride = int(self._num_values * GOLDEN_RATIO_CONJUGATE)
        while math.gcd(self._stride, self._num_values) != 1:
            self._stride += 1

    def train_problem(self, rng: np.random.Generator) -> Addition:
        """Two operands of the training split."""
        a, b = rng.integers(self._num_held_out, self._num_values, size=2).tolist()
        return Addition(self._operand(a), self._operand(b))

    def held_out_problems(self, n: int) -> list[Addition]:
        """The first `n` of one fixed sequence of distinct problems, both operands held out; the same in every run."""
        available = self._num_held_out**2
        if n > available:
            raise too_few_held_out(n, available, "task.num_digits")
        rng = np.random.default_rng(HELD_OUT_SEED)
        problems: dict[Addition, None] = {}
        while len(problems) < n:
            a, b = rng.integers(0, self._num_held_out, size=2).tolist()
            problems[Addition(self._operand(a), self._operand(b))] = None
        return list(problems)

    def prompt_text(self, problem: Addition) -> str:
        """`a+b=`."""
        return f"{problem.a}+{problem.b}="

    def answer(self, problem: Addition) -> str:
        """The sum."""
        return str(problem.a + problem.b)

    def _operand(self, rank: int) -> int:
        """The operand at a place of the fixed order: held out below `_num_held_out`, else of training."""
        return self._smallest + rank * self._stride % self._num_values


class ArithmeticTask(AdditionTask):
    """Problems, worked traces and tokens of `num_digits`-digit addition; no operand is in training and held out."""

    name = "arithmetic"
    vocabulary = Vocabulary("0123456789+=;\n")

    def __init__(self, config: ArithmeticTaskConfig) -> None:
        super().__init__(config.num_digits, config.held_out_frac)
        self.config = config
        # 9 a column, newline, `Answer: `, one more digit than an operand, end of sequence.
        self.max_trace_tokens = 9 * config.num_digits + 2 + (config.num_digits + 1) + 1

    def worked_trace(self, problem: Addition) -> str:
        """The right trace, without the end-of-sequence token."""
        num_columns = self.config.num_digits
        return _trace(*problem, wrong_sums=[None] * num_columns, forgets_carry=[False] * num_columns)

    def noisy_trace(self, rng: np.random.Generator, problem: Addition) -> str:
        """A trace with slips.

        Each column forgets to pass its carry on with `carry_error_prob`, and has a random sum with `digit_error_prob`.
        The columns to its left and the answer go on from the slip: every trace agrees with itself.
        """
        num_columns = self.config.num_digits
        is_wrong = rng.random(num_columns) < self.config.digit_error_prob
        random_sums = rng.integers(0, 20, size=num_columns)
        wrong_sums = [int(total) if wrong else None for total, wrong in zip(random_sums, is_wrong, strict=True)]
        forgets_carry = (rng.random(num_columns) < self.config.carry_error_prob).tolist()
        return _trace(*problem, wrong_sums, forgets_carry)


def _trace(a: int, b: int, wrong_sums: Sequence[int | None], forgets_carry: Sequence[bool]) -> str:
    columns, digits, carry = [], [], 0
    for x, y, wrong_sum, forgets in zip(reversed(str(a)), reversed(str(b)), wrong_sums, forgets_carry, strict=True):
        total = int(x) + int(y) + carry if wrong_sum is None else wrong_sum
        columns.append(f"{x}+{y}+{carry}={total:02d};")
        digits.append(str(total % 10))
        carry = 0 if forgets else total // 10
    if carry:
        digits.append(str(carry))
    return "".join(columns) + "\n" + ANSWER + "".join(reversed(digits))
