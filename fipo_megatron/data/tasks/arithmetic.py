"""Multi-digit addition with worked traces: a task that a tiny policy can learn in minutes on a CPU.

A prompt is `7345+5128=`. Its worked trace adds column by column from the right, each as digit + digit + carry =
two-digit sum, and ends with the line that the reward reads:

    5+8+0=13;4+2+1=07;3+1+0=04;7+5+0=12;
    Answer: 12473
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fipo_megatron.config.schema import ArithmeticTaskConfig

DATA_SOURCE = "arithmetic"

ANSWER = "Answer: "  # one token, so that the whole answer line costs the policy little
SYMBOLS = (*"0123456789+=;\n", ANSWER)
EOS, PAD = "<eos>", "<pad>"
VOCAB_SIZE = 32  # rounded up so that it divides over tensor-parallel ranks; unused tokens are visible when decoded
VOCAB = (*SYMBOLS, EOS, PAD, *(f"<unused{i}>" for i in range(len(SYMBOLS) + 2, VOCAB_SIZE)))
TOKEN_IDS = {token: i for i, token in enumerate(VOCAB)}
TOKEN_PATTERN = re.compile(re.escape(ANSWER) + "|.", re.DOTALL)
BYTE_LEVEL_NEWLINE = "Ċ"  # how a byte-level vocabulary spells a newline

GOLDEN_RATIO_CONJUGATE = (math.sqrt(5) - 1) / 2
HELD_OUT_SEED = 2**31  # beyond every run seed


class Problem(NamedTuple):
    """Two operands to add."""

    a: int
    b: int


class ArithmeticTask:
    """Problems, worked traces and tokens of `num_digits`-digit addition.

    Train and held-out operands are disjoint as values, in a split that no seed moves: of the values in a fixed order
    the first `held_out_frac` are held out.
    """

    name = "arithmetic"
    size = VOCAB_SIZE
    eos_token_id = TOKEN_IDS[EOS]
    pad_token_id = TOKEN_IDS[PAD]

    def __init__(self, config: ArithmeticTaskConfig) -> None:
        self.config = config
        self._smallest: int = 10 ** (config.num_digits - 1)
        self._num_values: int = 9 * self._smallest
        self._num_held_out = round(self._num_values * config.held_out_frac)
        if self._num_held_out == 0:
            raise ValueError(
                f"task.held_out_frac: {config.held_out_frac} of {self._num_values} operands leaves none to "
                f"evaluate on; use {1 / self._num_values:.2g} or more, or raise task.num_digits ({config.num_digits})"
            )
        # The order is that of multiples of the golden ratio modulo the number of values: every stretch of it is spread
        # evenly over magnitudes and last digits, so held-out operands are as hard as those of training.
        self._stride = int(self._num_values * GOLDEN_RATIO_CONJUGATE)
        while math.gcd(self._stride, self._num_values) != 1:
            self._stride += 1

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of every prompt: two operands, `+` and `=`."""
        return 2 * self.config.num_digits + 2

    @property
    def max_trace_tokens(self) -> int:
        """Tokens of the longest worked trace: 9 a column, newline, `Answer: `, one more digit than an operand, end."""
        return 9 * self.config.num_digits + 2 + (self.config.num_digits + 1) + 1

    @property
    def vocabulary(self) -> ArithmeticTask:
        """Tokens and their ids; the task is its own vocabulary."""
        return self

    def draw_trace(self, rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of a training problem's prompt and of a noisy trace for it, which ends in end of sequence."""
        problem = self.train_problem(rng)
        trace = self.encode(self.noisy_trace(rng, *problem))
        return self.encode(self.prompt_text(*problem)), (*trace, self.eos_token_id)

    def check_limits(self, max_prompt_tokens: int, max_response_tokens: int) -> None:
        """Returns nothing; a limit too small for the task is a ValueError."""
        for key, limit, needed in (
            ("rollout.max_prompt_tokens", max_prompt_tokens, self.max_prompt_tokens),
            ("rollout.max_response_tokens", max_response_tokens, self.max_trace_tokens),
        ):
            if limit < needed:
                raise ValueError(
                    f"{key}: {limit} is too small for task.num_digits = {self.config.num_digits}; "
                    f"set it to {needed} or more, or use fewer digits"
                )

    def train_problem(self, rng: np.random.Generator) -> Problem:
        """Two operands of the training split."""
        a, b = rng.integers(self._num_held_out, self._num_values, size=2).tolist()
        return Problem(self._operand(a), self._operand(b))

    def held_out_problems(self, n: int) -> list[Problem]:
        """The first `n` of one fixed sequence of distinct problems, both operands held out; the same in every run."""
        available = self._num_held_out**2
        if n > available:
            raise ValueError(
                f"evaluation.num_problems: {n} is more than the {available} distinct problems that "
                f"task.held_out_frac = {self.config.held_out_frac} leaves; lower it, or raise "
                "task.held_out_frac or task.num_digits"
            )
        rng = np.random.default_rng(HELD_OUT_SEED)
        problems: dict[Problem, None] = {}
        while len(problems) < n:
            a, b = rng.integers(0, self._num_held_out, size=2).tolist()
            problems[Problem(self._operand(a), self._operand(b))] = None
        return list(problems)

    def prompt_text(self, a: int, b: int) -> str:
        """`a+b=`, what the policy is given."""
        return f"{a}+{b}="

    def answer(self, a: int, b: int) -> str:
        """The ground truth."""
        return str(a + b)

    def worked_trace(self, a: int, b: int) -> str:
        """The right trace of a + b, without the end-of-sequence token."""
        num_columns = self.config.num_digits
        return _trace(a, b, wrong_sums=[None] * num_columns, forgets_carry=[False] * num_columns)

    def noisy_trace(self, rng: np.random.Generator, a: int, b: int) -> str:
        """A trace with slips, for the warm start: what the base policy learns to imitate.

        Each column forgets to pass its carry on with `carry_error_prob`, and has a random sum with `digit_error_prob`.
        The columns to its left and the answer go on from the slip: every trace agrees with itself.
        """
        num_columns = self.config.num_digits
        is_wrong = rng.random(num_columns) < self.config.digit_error_prob
        random_sums = rng.integers(0, 20, size=num_columns)
        wrong_sums = [int(total) if wrong else None for total, wrong in zip(random_sums, is_wrong, strict=True)]
        forgets_carry = (rng.random(num_columns) < self.config.carry_error_prob).tolist()
        return _trace(a, b, wrong_sums, forgets_carry)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt or a trace, without end of sequence; a character outside the task is a ValueError."""
        tokens = TOKEN_PATTERN.findall(text)
        unknown = sorted(set(tokens) - set(SYMBOLS))
        if unknown:
            raise ValueError(f"text: {text!r} has {unknown}, which the arithmetic task cannot write; use {SYMBOLS}")
        return tuple(TOKEN_IDS[token] for token in tokens)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids, end of sequence and padding left out."""
        return "".join(VOCAB[i] for i in token_ids if i not in (self.eos_token_id, self.pad_token_id))

    def write_tokenizer(self, folder: Path) -> None:
        """Writes a Hugging Face tokenizer with the same tokens, for `AutoTokenizer.from_pretrained(folder)`.

        It is a Qwen2 tokenizer without merges: beside a Qwen2 model, transformers 5 loads any other class as one too.
        """
        from transformers import AddedToken, Qwen2Tokenizer

        vocab = {BYTE_LEVEL_NEWLINE if token == "\n" else token: i for token, i in TOKEN_IDS.items()}
        tokenizer: Any = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token=EOS, pad_token=PAD, unk_token=PAD)
        tokenizer.add_tokens([AddedToken(ANSWER, normalized=False)])
        tokenizer.save_pretrained(folder)

    def _operand(self, rank: int) -> int:
        """The operand at a place of the fixed order: held out below `_num_held_out`, else of training."""
        return self._smallest + rank * self._stride % self._num_values


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
