"""Prompts of a run: an endless seeded stream for training, a fixed list for evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from fipo_megatron.data.tasks.base import Task
from fipo_megatron.types import Encode, Prompt

PROMPT_STREAM = 1  # keeps the random numbers apart from those of other purposes with the same seed


class PromptSampler:
    """An endless stream of training prompts. Prompt i depends on seed and i alone: the whole state is the next i."""

    def __init__(self, task: Task[Any], encode: Encode, seed: int) -> None:
        self._task = task
        self._encode = encode
        self._seed = seed
        self._next_index = 0

    def next_prompts(self, n: int) -> list[Prompt]:
        """The next `n` prompts, with uids unique within the run."""
        indices = range(self._next_index, self._next_index + n)
        self._next_index = indices.stop
        return [self._prompt(i) for i in indices]

    def _prompt(self, index: int) -> Prompt:
        problem = self._task.train_problem(np.random.default_rng([PROMPT_STREAM, self._seed, index]))
        return _make_prompt(self._task, self._encode, f"train/{index:06d}", problem)

    def state_dict(self) -> dict[str, int]:
        """The position in the stream, as plain values."""
        return {"seed": self._seed, "next_index": self._next_index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues the stream where `state` was taken; another seed is a ValueError."""
        if state["seed"] != self._seed:
            raise ValueError(
                f"seed: {self._seed} differs from {state['seed']}, with which the saved prompt order began; "
                f"resume with seed={state['seed']} or start a new run"
            )
        self._next_index = state["next_index"]


def held_out_prompts(task: Task[Any], encode: Encode, n: int) -> list[Prompt]:
    """The same `n` evaluation prompts in every run."""
    problems = task.held_out_problems(n)
    return [_make_prompt(task, encode, f"held_out/{i:06d}", problem) for i, problem in enumerate(problems)]


def _make_prompt(task: Task[Any], encode: Encode, uid: str, problem: Any) -> Prompt:
    return Prompt(
        uid=uid,
        token_ids=encode(task.prompt_text(problem)),
        ground_truth=task.answer(problem),
        data_source=task.name,
    )
