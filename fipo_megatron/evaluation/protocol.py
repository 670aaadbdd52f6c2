"""How good a policy is, from several samples of each held-out problem: avg@k, cons@k and pass@k with their intervals.

Estimators return one score a problem, so that one bootstrap over problems serves them all: samples of one problem are
not independent, problems are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fipo_megatron.evaluation.reflection import Reflection, find_reflection, reflection_rates
from fipo_megatron.types import Decode, Generation, Judge, Prompt

CONFIDENCE = 0.95
RIGHT = object()  # the vote of every right sample
NUM_RESAMPLES, RESAMPLES_AT_ONCE = 10_000, 1_000


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
    reflections: tuple[Reflection, ...]  # whether the response verifies, re-derives or corrects itself
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
    texts = [decode(generation.token_ids) for generation in generations]
    judged = judge(
        [prompt for prompt in prompts for _ in range(samples_per_prompt)],
        texts,
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
                reflections=tuple(map(find_reflection, texts[rows])),
                unjudged=tuple(judgement.failure is not None for judgement in judgements),
            )
        )
    return results


def write_results(path: Path, results: Iterable[ProblemResult]) -> None:
    """Writes one line of JSON for every problem, in order. The same results give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for result in results:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")


def write_sets(path: Path, num_problems: Mapping[str, int], rules: Mapping[str, str]) -> None:
    """Writes how many problems a run's evaluation sets have and which rule judges them, by name of the set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sets = {name: {"num_problems": number, "rule": rules[name]} for name, number in num_problems.items()}
    path.write_text(json.dumps(sets, indent=2) + "\n", encoding="utf-8")


def run_metrics(results: Sequence[ProblemResult], unreadable: Collection[str], seed: int) -> dict[str, float]:
    """What a run records of its sampled responses, k for each problem: `sampled_` and the names of `accuracy_metrics`,
    the shares of `reflection_rates`, and where k > 1 the estimates of `metrics_at_k`."""
    metrics = {f"sampled_{name}": value for name, value in accuracy_metrics(results).items()} | _reflections(results)
    return metrics | metrics_at_k(results, unreadable, seed) if len(results[0].correct) > 1 else metrics


def accuracy_metrics(results: Sequence[ProblemResult]) -> dict[str, float]:
    """`accuracy`, `accuracy_stderr`, `mean_response_tokens`, `truncated_frac` (share that hit the token limit) and
    `unjudged` (number of responses that the reward failed on: they count as wrong).

    No problem, or another number of samples in one, is a ValueError.
    """
    mean, standard_error = accuracy(_correct(results))
    return {"accuracy": mean, "accuracy_stderr": standard_error} | _unjudged(results) | _lengths(results)


def summarize(results: Sequence[ProblemResult], unreadable: Collection[str], seed: int) -> dict[str, float]:
    """All that is said of a set: the estimates of `metrics_at_k`, lengths and `unjudged` as in `accuracy_metrics`, and
    the shares of `reflection_rates`."""
    return metrics_at_k(results, unreadable, seed) | _lengths(results) | _unjudged(results) | _reflections(results)


def metrics_at_k(results: Sequence[ProblemResult], unreadable: Collection[str], seed: int) -> dict[str, float]:
    """`avg@k`, `cons@k` and `pass@k` over all problems, k the number of samples of each, written out (`avg@32`), and
    `pass@j` for j = 2, 4, 8, ... below k (`pass@1` is `avg@k`).

    Each estimate comes with the ends of its bootstrap interval under `_low` and `_high`. `unreadable` are the
    predictions that stand for no answer. No problem, or another number of samples in one, is a ValueError.
    """
    correct = _correct(results)
    k = correct.shape[1]
    estimates = {
        f"avg@{k}": correct.mean(axis=1),
        f"cons@{k}": np.array(
            [consensus_is_correct(result.predictions, result.correct, unreadable) for result in results]
        ),
    }
    estimates |= {f"pass@{j}": pass_at_k(correct, j) for j in (*powers_of_two_below(k), k)}
    metrics: dict[str, float] = {}
    for name, scores in estimates.items():
        low, high = bootstrap_interval(scores, seed)
        metrics |= {name: float(scores.mean()), f"{name}_low": low, f"{name}_high": high}
    return metrics


def powers_of_two_below(k: int) -> list[int]:
    """2, 4, 8, ... while less than k."""
    return [2**i for i in range(1, (k - 1).bit_length())]


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
    num_correct, problem = np.unique(correct.astype(np.int64).sum(axis=1), return_inverse=True)
    num_draws = math.comb(n, k)
    return np.array([1 - math.comb(n - c, k) / num_draws for c in num_correct.tolist()], np.float64)[problem]


def consensus_is_correct(predictions: Sequence[str], correct: Sequence[bool], unreadable: Collection[str]) -> bool:
    """Whether the answer that most samples agree on is right (cons@k); of equally many, the one that came first counts.

    All right samples gave one answer, however they wrote it; wrong answers agree where they are equal as text. Samples
    without an answer, their prediction one of `unreadable`, do not vote.
    """
    votes = Counter(
        RIGHT if is_right else prediction
        for prediction, is_right in zip(predictions, correct, strict=True)
        if is_right or prediction not in unreadable
    )
    return bool(votes) and votes.most_common(1)[0][0] is RIGHT  # most_common keeps the order of equal counts


def bootstrap_interval(scores: np.ndarray, seed: int) -> tuple[float, float]:
    """Both ends of the 95 % percentile interval of the mean of `scores` [problems], problems drawn with replacement."""
    rng = np.random.default_rng(seed)
    shape = (RESAMPLES_AT_ONCE, len(scores))
    means = [
        scores[rng.integers(len(scores), size=shape)].mean(axis=1) for _ in range(NUM_RESAMPLES // RESAMPLES_AT_ONCE)
    ]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _correct(results: Sequence[ProblemResult]) -> np.ndarray:
    """bool [problems, samples per problem]."""
    sizes = sorted({len(result.correct) for result in results})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(f"results: problems have {sizes or 'no'} samples; give each the same number, at least one")
    return np.array([result.correct for result in results])


def _unjudged(results: Sequence[ProblemResult]) -> dict[str, float]:
    return {"unjudged": sum(sum(result.unjudged) for result in results)}


def _lengths(results: Sequence[ProblemResult]) -> dict[str, float]:
    return {
        "mean_response_tokens": float(np.mean([result.num_tokens for result in results])),
        "truncated_frac": float(np.mean([result.truncated for result in results])),
    }


def _reflections(results: Sequence[ProblemResult]) -> dict[str, float]:
    return reflection_rates([reflection for result in results for reflection in result.reflections])
