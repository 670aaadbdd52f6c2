"""How good a policy is, from several samples of each held-out problem: avg@k, cons@k and pass@k with their intervals.

Estimators return one score a problem, so that one bootstrap over problems serves them all: samples of one problem are
not independent, problems are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fipo_megatron.types import Decode, Generation, Judge, Prompt

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class ProblemResult:
    """One problem's judged samples: a row of the evaluation's table. Tuples hold one value a sample, in order."""

    uid: str
    data_source: str
    ground_truth: str
    predictions: tuple[str, ...]  # as the reward's rule extracted and normalised them
    correct: tuple[bool, ...]
    num_tokens: tuple[int, ...]  # of the responses
    truncated: tuple[bool, ...]  # the response hit the token limit
    unjudged: tuple[bool, ...]  # the reward failed on the response, which counts as wrong


def judge_problems(
    prompts: Sequence[Prompt], generations: Sequence[Generation], judge: Judge, decode: Decode
) -> list[ProblemResult]:
    """One result a prompt, in prompt order.

    `generations` holds the same number of samples for every prompt, in prompt order; another number is a RuntimeError.
    """
    samples_per_prompt, rest = divmod(len(generations), max(len(prompts), 1))
    if samples_per_prompt == 0 or rest:
        raise RuntimeError(f"{len(generations)} responses for {len(prompts)} prompts: not the same number for each")
    judged = judge(
        [prompt for prompt in prompts for _ in range(samples_per_prompt)],
        [decode(generation.token_ids) for generation in generations],
        [len(generation.token_ids) for generation in generations],
    )
    results = []
    for i, prompt in enumerate(prompts):
        rows = slice(i * samples_per_prompt, (i + 1) * samples_per_prompt)
        samples, judgements = generations[rows], judged[rows]
        results.append(
            ProblemResult(
                uid=prompt.uid,
                data_source=prompt.data_source,
                ground_truth=prompt.ground_truth,
                predictions=tuple(judgement.prediction for judgement in judgements),
                correct=tuple(judgement.accuracy == 1.0 for judgement in judgements),
                num_tokens=tuple(len(sample.token_ids) for sample in samples),
                truncated=tuple(sample.finish_reason == "length" for sample in samples),
                unjudged=tuple(judgement.failure is not None for judgement in judgements),
            )
        )
    return results


def evaluate(
    prompts: Sequence[Prompt], generations: Sequence[Generation], judge: Judge, decode: Decode
) -> dict[str, float]:
    """`accuracy`, `accuracy_stderr`, `mean_response_tokens`, `truncated_frac` (share that hit the token limit) and
    `unjudged` (number of responses that the reward failed on: they count as wrong).

    `generations` holds the same number of samples for every prompt, in prompt order; another number is a RuntimeError.
    """
    results = judge_problems(prompts, generations, judge, decode)
    mean, standard_error = accuracy(_correct(results))
    unjudged = sum(sum(result.unjudged) for result in results)
    return {"accuracy": mean, "accuracy_stderr": standard_error, "unjudged": unjudged} | _lengths(results)


def summarize(results: Sequence[ProblemResult], no_answer: str, seed: int) -> dict[str, float]:
    """`avg@k`, `cons@k` and `pass@k` over all problems, k the number of samples of each, and lengths as in `evaluate`.

    Each estimate comes with the ends of its bootstrap interval under `_low` and `_high`. `no_answer` is the prediction
    of a response in which the rule found none. No problem, or another number of samples in one, is a ValueError.
    """
    correct = _correct(results)
    k = correct.shape[1]
    estimates = {
        "avg": correct.mean(axis=1),
        "cons": np.array([consensus_is_correct(result.predictions, result.correct, no_answer) for result in results]),
        "pass": pass_at_k(correct, k),
    }
    summary: dict[str, float] = {}
    for name, scores in estimates.items():
        low, high = bootstrap_interval(scores, seed)
        summary |= {f"{name}@{k}": float(scores.mean()), f"{name}@{k}_low": low, f"{name}@{k}_high": high}
    return summary | _lengths(results)


def accuracy(correct: np.ndarray) -> tuple[float, float]:
    """Mean of `correct`, which is avg@k for k samples a problem, and its standard error.

    `correct` is [problems, samples per problem] of 0 and 1. Samples of one problem are not independent, so the error is
    that of the mean over problems: std of the problems' means / sqrt(problems). With one sample a problem that is
    sqrt(p (1 - p) / problems).
    """
    problem_means = correct.astype(np.float64).mean(axis=1)
    return float(problem_means.mean()), float(problem_means.std() / np.sqrt(len(problem_means)))


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """float64 [problems]: chance that k of a problem's samples, drawn without replacement, hold a right one.

    `correct` is [problems, n] of 0 and 1; 1 <= k <= n, else a ValueError. With c right samples it is
    1 - C(n - c, k) / C(n, k), the unbiased estimator (arXiv 2107.03374, equation 1).
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}: must be between 1 and the {n} samples of each problem; lower it, or sample more")
    by_num_correct = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return by_num_correct[correct.astype(np.int64).sum(axis=1)]


def majority_vote(predictions: Sequence[str], no_answer: str) -> str:
    """The prediction that most samples agree on, equal as text; among equally many, the one that came first.

    Samples without an answer do not vote: `no_answer` is returned only if no sample has one.
    """
    votes = Counter(prediction for prediction in predictions if prediction != no_answer)
    return votes.most_common(1)[0][0] if votes else no_answer  # most_common keeps the order of equal counts


def consensus_is_correct(predictions: Sequence[str], correct: Sequence[bool], no_answer: str) -> bool:
    """Whether the majority's answer is right (cons@k), as judged at the first sample that gave it."""
    return correct[predictions.index(majority_vote(predictions, no_answer))]


def bootstrap_interval(scores: np.ndarray, seed: int) -> tuple[float, float]:
    """Both ends of the 95 % percentile interval of the mean of `scores` [problems], problems drawn with replacement."""
    rng = np.random.default_rng(seed)
    num_problems = len(scores)
    means = [scores[rng.integers(num_problems, size=num_problems)].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _correct(results: Sequence[ProblemResult]) -> np.ndarray:
    """bool [problems, samples per problem]."""
    sizes = sorted({len(result.correct) for result in results})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(f"results: problems have {sizes or 'no'} samples; give each the same number, at least one")
    return np.array([result.correct for result in results])


def _lengths(results: Sequence[ProblemResult]) -> dict[str, float]:
    return {
        "mean_response_tokens": float(np.mean([result.num_tokens for result in results])),
        "truncated_frac": float(np.mean([result.truncated for result in results])),
    }
