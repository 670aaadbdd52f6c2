"""An endless stream of prompts from several files, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np

from fipo_megatron.types import Prompt

MIXTURE_STREAM = 4  # keeps the random numbers apart from those of other purposes with the same seed


class MixtureSampler:
    """A stream that goes through each file's prompts in one order an epoch, of its own for every file and epoch.

    After any number n of draws every file was drawn from n * share times, give or take less than 1. The stream depends
    on seed, prompts and weights alone: the whole state is how many each file has given.
    """

    def __init__(self, files: Sequence[Sequence[Prompt]], weights: Sequence[float], seed: int) -> None:
        assert all(files), "a file without prompts"
        self._files = files
        # Exact: rounding would add up over a long run.
        total = sum(map(Fraction, weights))
        self._shares = [Fraction(weight) / total for weight in weights]
        self._seed = seed
        self._num_drawn = [0] * len(files)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each file, its epoch and the order of its prompts

    def next_prompts(self, n: int) -> list[Prompt]:
        """The next `n` prompts, with uids unique within the run."""
        return [self._draw(next_file(self._num_drawn, self._shares)) for _ in range(n)]

    def _draw(self, file: int) -> Prompt:
        prompts = self._files[file]
        epoch, position = divmod(self._num_drawn[file], len(prompts))
        self._num_drawn[file] += 1
        prompt = prompts[self._order(file, epoch)[position]]
        return replace(prompt, uid=f"train/{epoch}/{prompt.uid}")

    def _order(self, file: int, epoch: int) -> np.ndarray:
        if self._orders.get(file, (None, None))[0] != epoch:
            rng = np.random.default_rng([MIXTURE_STREAM, self._seed, file, epoch])
            self._orders[file] = (epoch, rng.permutation(len(self._files[file])))
        return self._orders[file][1]

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, as plain values."""
        return {"seed": self._seed, "num_drawn": list(self._num_drawn), "num_prompts": [*map(len, self._files)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the stream where `state` was taken; another seed or files of other sizes are a ValueError."""
        if state["seed"] != self._seed:
            raise ValueError(
                f"seed: {self._seed} differs from {state['seed']}, with which the saved prompt order began; "
                f"resume with seed={state['seed']} or start a new run"
            )
        num_prompts = [*map(len, self._files)]
        if state["num_prompts"] != num_prompts:
            raise ValueError(
                f"data.train: the files give {num_prompts} prompts, {state['num_prompts']} when the run was saved; "
                "resume with the same files and rollout.max_prompt_tokens, or start a new run"
            )
        self._num_drawn = list(state["num_drawn"])


def next_file(num_drawn: Sequence[int], shares: Sequence[Fraction]) -> int:
    """The file to draw from, so that each one's count stays within less than 1 of its share of all draws.

    Of the files that a draw would not put ahead of their share by 1 or more, the one that would first fall behind by
    as much: earliest deadline first, which meets all deadlines when shares sum to 1.
    """
    num_draws = sum(num_drawn) + 1
    deadlines = [
        (ceil((drawn + 1) / share), file)
        for file, (drawn, share) in enumerate(zip(num_drawn, shares, strict=True))
        if drawn < share * num_draws
    ]
    return min(deadlines)[1]
