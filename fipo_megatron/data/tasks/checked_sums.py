"""Sums with a check that is the policy's choice: a task in which length pays.

The problems are those of the arithmetic task, `7345+5128=`. A trace adds column by column from the right and leaves the
carries out; then it may check, which carries; then it answers with the last sums it has:

    5+8=13;4+2=06;3+1=04;7+5=12;?13+0=13;06+1=07;04+0=04;12+0=12;
    Answer: 12473

Without the check (`?` to the last `;`) the answer is right only where nothing is carried, a sixth of four-digit
problems; with it, nearly always, at twice the length. The base policy checks with `check_prob`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fipo_megatron.config.problems import CheckedSumsTaskConfig
from fipo_megatron.data.tasks.arithmetic import Addition, AdditionTask
from fipo_megatron.data.tasks.base import ANSWER, Vocabulary


class CheckedSumsTask(AdditionTask):
    """Problems, traces and tokens of sums with an optional check. The split is that of the arithmetic task."""

    name = "checked_sums"
    vocabulary = Vocabulary("0123456789+=;?\n")

    def __init__(self, config: CheckedSumsTaskConfig) -> None:
        super().__init__(config.num_digits, config.held_out_frac)
        self.config = config
        # 7 a column; `?` and 8 a column; newline, `Answer: `, one more digit than an operand, end of sequence.
        self.max_trace_tokens = 7 * config.num_digits + 1 + 8 * config.num_digits + 2 + (config.num_digits + 1) + 1

    def noisy_trace(self, rng: np.random.Generator, problem: Addition) -> str:
        """A trace that checks with `check_prob`; each first sum is random with `digit_error_prob`, and carried on."""
        is_wrong = rng.random(self.config.num_digits) < self.config.digit_error_prob
        random_sums = rng.integers(0, 19, size=self.config.num_digits)
        wrong_sums = [int(total) if wrong else None for total, wrong in zip(random_sums, is_wrong, strict=True)]
        return self.trace(problem, rng.random() < self.config.check_prob, wrong_sums)

    def trace(self, problem: Addition, checks: bool, wrong_sums: Sequence[int | None] | None = None) -> str:
        """The trace with or without a check, and with these first sums where they are not None."""
        columns = list(zip(map(int, reversed(str(problem.a))), map(int, reversed(str(problem.b))), strict=True))
        sums = [x + y for x, y in columns]
        if wrong_sums is not None:
            sums = [right if wrong is None else wrong for right, wrong in zip(sums, wrong_sums, strict=True)]
        text = "".join(f"{x}+{y}={total:02d};" for (x, y), total in zip(columns, sums, strict=True))
        if checks:
            text, carry = text + "?", 0
            for i, total in enumerate(sums):
                sums[i] = total + carry
                text += f"{total:02d}+{carry}={sums[i]:02d};"
                carry = sums[i] // 10
        *lower, highest = sums
        return f"{text}\n{ANSWER}{highest}{''.join(str(total % 10) for total in reversed(lower))}"
