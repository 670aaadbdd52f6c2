"""What every seeded task generator offers, and the small vocabulary that its base policy reads and writes."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

ANSWER = "Answer: "  # one token, so that the whole answer line costs the policy little
EOS, PAD = "<eos>", "<pad>"
BYTE_LEVEL_NEWLINE = "Ċ"  # how a byte-level vocabulary spells a newline
HELD_OUT_SEED = 2**31  # beyond every run seed

Problem = TypeVar("Problem")


class Vocabulary:
    """Token ids of a task's symbols: single characters and `Answer: `, then end of sequence and padding.

    `size` is rounded up so that it divides over tensor-parallel ranks; unused tokens are visible when decoded.
    """

    def __init__(self, characters: str, size: int = 32) -> None:
        self.symbols = (*characters, ANSWER)
        assert len(set(self.symbols)) == len(self.symbols) <= size - 2, f"{len(self.symbols)} symbols, {size} tokens"
        self.size = size
        self.tokens = (*self.symbols, EOS, PAD, *(f"<unused{i}>" for i in range(len(self.symbols) + 2, size)))
        self.token_ids = {token: i for i, token in enumerate(self.tokens)}
        self.eos_token_id = self.token_ids[EOS]
        self.pad_token_id = self.token_ids[PAD]

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt or a trace, without end of sequence; another character than the task's: ValueError."""
        tokens = re.findall(re.escape(ANSWER) + "|.", text, re.DOTALL)
        unknown = sorted(set(tokens) - set(self.symbols))
        if unknown:
            raise ValueError(f"text: {text!r} has {unknown}, which the task cannot write; use {self.symbols}")
        return tuple(self.token_ids[token] for token in tokens)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids, end of sequence and padding left out."""
        return "".join(self.tokens[i] for i in token_ids if i not in (self.eos_token_id, self.pad_token_id))

    def write_tokenizer(self, folder: Path) -> None:
        """Writes a Hugging Face tokenizer with the same tokens, for `AutoTokenizer.from_pretrained(folder)`.

        It is a Qwen2 tokenizer without merges: beside a Qwen2 model, transformers 5 loads any other class as one too.
        """
        from transformers import AddedToken, Qwen2Tokenizer

        vocab = {BYTE_LEVEL_NEWLINE if token == "\n" else token: i for token, i in self.token_ids.items()}
        tokenizer: Any = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token=EOS, pad_token=PAD, unk_token=PAD)
        tokenizer.add_tokens([AddedToken(ANSWER, normalized=False)])
        tokenizer.save_pretrained(folder)


class Task(ABC, Generic[Problem]):
    """Problems of one kind, what the policy is given of each, and the traces that its base policy is made of.

    Train and held-out problems are disjoint, in a split that no seed moves.
    """

    name: str  # `task.name` in the configuration
    vocabulary: Vocabulary
    max_prompt_tokens: int
    max_trace_tokens: int  # of the longest trace, with its end of sequence

    @abstractmethod
    def train_problem(self, rng: np.random.Generator) -> Problem:
        """A problem of the training split."""

    @abstractmethod
    def held_out_problems(self, n: int) -> list[Problem]:
        """The first `n` of one fixed sequence of distinct held-out problems; a ValueError if there are fewer."""

    @abstractmethod
    def prompt_text(self, problem: Problem) -> str:
        """What the policy is given."""

    @abstractmethod
    def answer(self, problem: Problem) -> str:
        """The ground truth."""

    @abstractmethod
    def noisy_trace(self, rng: np.random.Generator, problem: Problem) -> str:
        """A trace for the warm start, without end of sequence: what the base policy learns to imitate."""

    def draw_trace(self, rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of a training problem's prompt and of a noisy trace for it, which ends in end of sequence."""
        problem, encode = self.train_problem(rng), self.vocabulary.encode
        trace = encode(self.noisy_trace(rng, problem))
        return encode(self.prompt_text(problem)), (*trace, self.vocabulary.eos_token_id)

    def check_limits(self, max_prompt_tokens: int, max_response_tokens: int) -> None:
        """Returns nothing; a limit too small for the task is a ValueError."""
        for key, limit, needed in (
            ("rollout.max_prompt_tokens", max_prompt_tokens, self.max_prompt_tokens),
            ("rollout.max_response_tokens", max_response_tokens, self.max_trace_tokens),
        ):
            if limit < needed:
                raise ValueError(
                    f"{key}: {limit} is too small for the problems of task.name = {self.name!r} as configured; "
                    f"set it to {needed} or more, or make them easier (task)"
                )


def hashes_to_held_out(text: str, held_out_frac: float) -> bool:
    """Whether a problem with this prompt is held out: a share `held_out_frac` of all texts, always the same ones."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") < held_out_frac * 2**64


def too_few_held_out(n: int, available: int, task_keys: str) -> ValueError:
    """The error for more evaluation problems than a task has."""
    return ValueError(
        f"evaluation.num_problems: {n} is more than the {available} distinct problems that task.held_out_frac leaves; "
        f"lower it, or raise task.held_out_frac or {task_keys}"
    )
