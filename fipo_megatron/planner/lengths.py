"""How long prompts and responses are: measured by a run, listed in a file, or a stated distribution."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from fipo_megatron.config.schema import Config

NUM_QUANTILES = 4096  # of a stated distribution
SIGMA = 0.6  # of the logarithm of response lengths: one in 1,000 is over 5 times the mean where none is cut
MEAN_PROMPT_TOKENS = 200.0
GROUP_CORRELATION = 0.5  # of the lengths of one prompt's responses
MAX_TOKENS = 1 << 30  # of a prompt or a response, in a file


@dataclass(frozen=True)
class Lengths:
    """Tokens of N samples, each a prompt and a response. As a distribution, all N are equally likely.

    Raises:
        ValueError: no sample, arrays of different lengths, or a prompt or response without a token.
    """

    prompt: np.ndarray  # int64 [N]
    response: np.ndarray  # int64 [N]

    def __post_init__(self) -> None:
        if self.prompt.shape != self.response.shape or self.prompt.ndim != 1 or not self.prompt.size:
            raise ValueError(
                f"lengths: {self.prompt.shape} prompts and {self.response.shape} responses; give both for each of one "
                "or more samples"
            )
        least = min(int(self.prompt.min()), int(self.response.min()))
        if least < 1:
            raise ValueError(f"lengths: a sample has {least} tokens of prompt or response; both must be 1 or more")

    def __len__(self) -> int:
        return len(self.response)

    @property
    def sequence(self) -> np.ndarray:
        """Tokens of prompt and response together, int64 [N]."""
        return self.prompt + self.response

    @property
    def mean_prompt(self) -> float:
        """Tokens."""
        return float(self.prompt.mean())

    @property
    def mean_response(self) -> float:
        """Tokens."""
        return float(self.response.mean())

    def check_limits(self, config: Config) -> None:
        """Raises ValueError for samples that a run would not have."""
        for key, longest in (
            ("max_prompt_tokens", int(self.prompt.max())),
            ("max_response_tokens", int(self.response.max())),
        ):
            limit = getattr(config.rollout, key)
            if longest > limit:
                raise ValueError(
                    f"rollout.{key} = {limit}: the lengths have one of {longest} tokens; raise it, or give those of a "
                    "run with this limit"
                )

    def draw(self, num_samples: int, seed: int) -> Lengths:
        """`num_samples` of the samples, independent of each other, with replacement."""
        chosen = np.random.default_rng(seed).integers(len(self), size=num_samples)
        return Lengths(self.prompt[chosen], self.response[chosen])

    def draw_groups(self, num_groups: int, group_size: int, seed: int | Sequence[int], correlation: float) -> Lengths:
        """`num_groups` prompts, each with `group_size` responses one after the other.

        Responses of a prompt have like lengths: those are quantiles of the distribution at positions whose normal
        scores correlate by `correlation` within a group (a Gaussian copula); across groups they are independent.

        Raises:
            ValueError: a correlation outside 0 to 1.
        """
        if not 0 <= correlation <= 1:
            raise ValueError(f"group_correlation = {correlation:g}: must be between 0 and 1")
        rng = np.random.default_rng(seed)
        of_group = rng.standard_normal((num_groups, 1))
        of_sample = rng.standard_normal((num_groups, group_size))
        scores = (correlation**0.5 * of_group + (1 - correlation) ** 0.5 * of_sample).ravel()
        positions = np.array([NormalDist().cdf(score) for score in scores.tolist()])
        ranks = np.minimum((positions * len(self)).astype(np.int64), len(self) - 1)
        prompts = self.prompt[rng.integers(len(self), size=num_groups)]
        return Lengths(np.repeat(prompts, group_size), np.sort(self.response)[ranks])

    @classmethod
    def of_config(
        cls,
        config: Config,
        *,
        mean_response: float | None = None,
        sigma: float = SIGMA,
        mean_prompt: float = MEAN_PROMPT_TOKENS,
    ) -> Lengths:
        """Equally spaced quantiles of log-normal response lengths that `rollout.max_response_tokens` cuts.

        `mean_response` is that of what is cut; None: half of the limit, near which the paper's 32B run ends (over
        10,000 tokens of 20,480). `sigma` is of the logarithm, before it is cut; 0: all responses are equal. Prompts
        all have `mean_prompt` tokens, or the limit where that is less.

        Raises:
            ValueError: a mean outside 1 to the limit, or a negative sigma.
        """
        limit = config.rollout.max_response_tokens
        mean = limit / 2 if mean_response is None else mean_response
        if not 1 <= mean <= limit:
            raise ValueError(
                f"mean_response = {mean:g}: responses have 1 to rollout.max_response_tokens = {limit} tokens"
            )
        if not sigma >= 0:
            raise ValueError(f"sigma = {sigma:g}: must be 0 or more")
        if not mean_prompt >= 1:
            raise ValueError(f"mean_prompt = {mean_prompt:g}: must be 1 or more")
        prompt = round(min(mean_prompt, config.rollout.max_prompt_tokens))
        responses = _log_normal(mean, sigma, limit)
        return cls(np.full(len(responses), prompt, dtype=np.int64), responses)

    @classmethod
    def from_file(cls, path: Path) -> Lengths:
        """Lengths of a run folder's recorded samples, of one of its `samples/*.jsonl`, or of a list: a line a sample
        with the tokens of prompt and response, as `200 5120`, `[200, 5120]` or `{"prompt": 200, "response": 5120}`.
        Empty lines and what follows a # are passed over.

        Raises:
            ValueError: there is no such file, a line that is none of these, or no sample.
        """
        if not path.exists():
            raise ValueError(f"--lengths {path}: does not exist; give a run folder, a file of its samples/, or a list")
        files = [path]
        if path.is_dir():
            if (path / "metrics.jsonl").exists() and not (path / "samples").is_dir():
                raise ValueError(f"{path}: the run recorded no samples (run.sample_groups); give a list of lengths")
            folder = path / "samples" if (path / "samples").is_dir() else path
            files = sorted(file for file in folder.glob("*.jsonl") if file.is_file())
        pairs = [pair for file in files for pair in _read_pairs(file)]
        if not pairs:
            raise ValueError(f"{path}: no samples; give a run folder, a file of its samples/, or a list of lengths")
        prompts, responses = np.array(pairs, dtype=np.int64).T
        return cls(prompts, responses)


def _log_normal(mean: float, sigma: float, limit: int) -> np.ndarray:
    """Quantiles, int64 [NUM_QUANTILES], whose mean is `mean` up to rounding; the scale is found by bisection."""
    normal = NormalDist()
    scores = np.array([normal.inv_cdf((i + 0.5) / NUM_QUANTILES) for i in range(NUM_QUANTILES)])
    shape = np.exp(sigma * scores)
    low, high = 0.0, limit / float(shape[0])
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(middle * shape, 1, limit).mean() < mean:
            low = middle
        else:
            high = middle
    return np.clip(np.rint(high * shape), 1, limit).astype(np.int64)


def _read_pairs(file: Path) -> Iterator[tuple[int, int]]:
    """(prompt, response) tokens of each line of a file."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: is not text; give samples of a run, or a list of lengths") from None
    for number, line in enumerate(lines, start=1):
        text = line if line.startswith("{") else line.partition("#")[0]
        if not text.strip():
            continue
        try:
            pair = _read_pair(text)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file}:{number}: {text.strip()[:60]!r} is neither a recorded sample nor two numbers of tokens, of a "
                "prompt and its response, 1 or more each; correct or remove the line"
            ) from None
        yield pair


def _read_pair(text: str) -> tuple[int, int]:
    values: Any = json.loads(text) if text.lstrip()[0] in "{[" else [int(word) for word in text.split()]
    if isinstance(values, dict) and "response_ids" in values:
        values = [len(values["prompt_ids"]), len(values["response_ids"])]
    elif isinstance(values, dict):
        values = [values["prompt"], values["response"]]
    prompt, response = values
    if not all(type(number) is int and 1 <= number <= MAX_TOKENS for number in (prompt, response)):
        raise ValueError(text)
    return prompt, response
