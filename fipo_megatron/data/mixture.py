"""An endless stream of prompts from several files, mixed by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
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

    def __init__(
        self, files: Sequence[Sequence[Prompt]], weights: Sequence[float], seed: int, names: Sequence[str]
    ) -> None:
        """`names` are the files' own, for messages."""
        assert all(files), "a file without prompts"
        assert len(names) == len(files)
        self._files = files
        self._names = names
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
        return {
            "seed": self._seed,
            "num_drawn": list(self._num_drawn),
            "num_prompts": [*map(len, self._files)],
            "sha256": list(self._hashes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the stream where `state` was taken.

        Raises:
            ValueError: it is of another seed, of files with other prompts, or of a version that kept no hashes.
        """
        if "sha256" not in state:
            raise ValueError(
                "data.train: the saved place in the files has no hash of their prompts, so it is of another version of "
                "this project; resume with that version, or start a new run"
            )
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
        for name, found, saved in zip(self._names, self._hashes, state["sha256"], strict=True):
            if found != saved:
                raise ValueError(
                    f"data.train: {name} has other prompts, or in another order, than when the run was saved; resume "
                    "with the file as it was, or start a new run"
                )
        self._num_drawn = list(state["num_drawn"])

    @cached_property
    def _hashes(self) -> list[str]:
        """SHA-256 of each file's prompts in order: of a file that numbers them the uids alone would never differ."""
        hashes = []
        for prompts in self._files:
            digest = hashlib.sha256()
            for prompt in prompts:
                digest.update(repr((prompt.uid, prompt.ground_truth)).encode())
                digest.update(np.array([len(prompt.token_ids), *prompt.token_ids], np.int64).tobytes())
            hashes.append(digest.hexdigest())
        return hashes


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
