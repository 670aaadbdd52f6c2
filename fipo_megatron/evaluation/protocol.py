"""Accuracy over held-out problems, with its standard error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fipo_megatron.types import Decode, Generation, Judge, Prompt


def accuracy(correct: np.ndarray) -> tuple[float, float]:
    """Mean of `correct` and its standard error.

    `correct` is [problems, samples per problem] of 0 and 1. Samples of one problem are not independent, so the error is
    that of the mean over problems: std of the problems' means / sqrt(problems). With one sample a problem that is
    sqrt(p (1 - p) / problems).
    """
    problem_means = correct.astype(np.float64).mean(axis=1)
    return float(problem_means.mean()), float(problem_means.std() / np.sqrt(len(problem_means)))


def evaluate(
    prompts: Sequence[Prompt], generations: Sequence[Generation], judge: Judge, decode: Decode
) -> dict[str, float]:
    """`accuracy`, `accuracy_stderr`, `mean_response_tokens` and `truncated_frac` (share that hit the token limit).

    `generations` holds the same number of samples for every prompt, in prompt order; another number is a RuntimeError.
    """
    samples_per_prompt, rest = divmod(len(generations), max(len(prompts), 1))
    if samples_per_prompt == 0 or rest:
        raise RuntimeError(f"{len(generations)} responses for {len(prompts)} prompts: not the same number for each")
    judged_prompts = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    texts = [decode(generation.token_ids) for generation in generations]
    judgements = judge(judged_prompts, texts, [len(generation.token_ids) for generation in generations])
    correct = np.array([judgement.accuracy for judgement in judgements])
    mean, standard_error = accuracy(correct.reshape(len(prompts), samples_per_prompt))
    return {
        "accuracy": mean,
        "accuracy_stderr": standard_error,
        "mean_response_tokens": float(np.mean([len(generation.token_ids) for generation in generations])),
        "truncated_frac": float(np.mean([generation.finish_reason == "length" for generation in generations])),
    }
