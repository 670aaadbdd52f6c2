"""Estimators against enumeration of all draws, votes and resamples; judging on hand-made samples."""

import json
import math
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.evaluation.protocol import (
    ProblemResult,
    accuracy,
    accuracy_metrics,
    bootstrap_interval,
    consensus_is_correct,
    judge_problems,
    metrics_at_k,
    pass_at_k,
    run_metrics,
    summarize,
    write_results,
)
from fipo_megatron.evaluation.reflection import Reflection
from fipo_megatron.types import Generation, Judgement, Prompt

PROMPTS = [Prompt(f"held_out/{i}", (1,), str(i), "arithmetic") for i in range(4)]


def generation(answer: int, num_tokens: int, finish_reason: str = "stop") -> Generation:
    ids = np.full(num_tokens, answer, np.int32)
    return Generation(ids, np.zeros(num_tokens, np.float32), finish_reason, weight_version=0)


def judge(prompts: Sequence[Prompt], texts: Sequence[str], num_tokens: Sequence[int]) -> list[Judgement]:
    return [judge_one(*response) for response in zip(prompts, texts, num_tokens, strict=True)]


def judge_one(prompt: Prompt, text: str, num_tokens: int) -> Judgement:
    assert len(text) == num_tokens
    is_right = text[0] == prompt.ground_truth
    return Judgement(reward=is_right - 99.0, accuracy=float(is_right), prediction=text)


def decode(token_ids: np.ndarray) -> str:
    return "".join(map(str, token_ids))


def test_one_sample_a_problem_has_the_binomial_error() -> None:
    mean, error = accuracy(np.array([[1], [0], [1], [1], [0], [0], [0], [0]]))
    assert mean == 3 / 8
    assert error == pytest.approx(math.sqrt(3 / 8 * 5 / 8 / 8))


def test_samples_of_one_problem_do_not_count_as_independent() -> None:
    always_alike = np.repeat([[1], [0], [1], [0]], 16, axis=1)
    assert accuracy(always_alike)[1] == pytest.approx(math.sqrt(0.25 / 4))
    half_right_each = np.tile([0, 1], (4, 8))
    assert accuracy(half_right_each) == (0.5, 0.0)


def evaluate(generations: list[Generation]) -> dict[str, float]:
    return accuracy_metrics(judge_problems(PROMPTS, generations, judge, decode))


def test_metrics_count_answers_lengths_and_truncations() -> None:
    generations = [generation(0, 2), generation(1, 4), generation(9, 6, "length"), generation(3, 9)]
    assert evaluate(generations) == {
        "accuracy": 0.75,
        "accuracy_stderr": pytest.approx(math.sqrt(0.75 * 0.25 / 4)),
        "unjudged": 0,
        "mean_response_tokens": 5.25,
        "truncated_frac": 0.25,
    }


def test_a_response_that_cannot_be_judged_is_wrong_and_counted() -> None:
    def failing(prompts: Sequence[Prompt], texts: Sequence[str], num_tokens: Sequence[int]) -> list[Judgement]:
        judgements = judge(prompts, texts, num_tokens)
        return [Judgement(math.nan, 0.0, "[UNJUDGED]", failure="KeyError"), *judgements[1:]]

    generations = [generation(i, 2) for i in range(4)]
    results = judge_problems(PROMPTS, generations, failing, decode)
    metrics = accuracy_metrics(results)
    assert (metrics["accuracy"], metrics["unjudged"]) == (0.75, 1)
    assert summarize(results, (), seed=0)["unjudged"] == 1
    assert results[0].unjudged == (True,)


def test_samples_belong_to_their_prompt() -> None:
    right = [generation(i, 1) for i in range(4) for _ in range(3)]
    assert evaluate(right)["accuracy"] == 1.0
    assert evaluate(right[::-1])["accuracy"] == 0.0


@pytest.mark.parametrize("num_generations", [0, 3, 5])
def test_a_wrong_number_of_generations_is_refused(num_generations: int) -> None:
    with pytest.raises(RuntimeError, match=f"{num_generations} responses for 4 prompts"):
        evaluate([generation(0, 1)] * num_generations)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_sample(n: int) -> None:
    rows = np.array(list(product([0, 1], repeat=n)))
    for k in range(1, n + 1):
        brute_force = [np.mean([any(draw) for draw in combinations(row, k)]) for row in rows]
        np.testing.assert_allclose(pass_at_k(rows, k), brute_force, rtol=1e-12)


def test_pass_at_k_stays_exact_where_binomials_overflow_floats() -> None:
    # with one right sample of n, k of them hold it with chance k / n
    one_right = np.arange(4096)[None] == 7
    assert pass_at_k(one_right, 1024)[0] == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_more_draws_than_samples_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k}: must be between 1 and the 4 samples"):
        pass_at_k(np.ones((2, 4)), k)


UNREADABLE = ("[INVALID]", "[TIMEOUT]")
NO_ANSWER, TIMED_OUT = UNREADABLE


def consensus_by_enumeration(answers: tuple[str, ...], right: str) -> bool:
    """Whether the first answer that no other has more votes than is the right one."""
    candidates = [answer for i, answer in enumerate(answers) if answer not in answers[:i] and answer not in UNREADABLE]
    winners = [a for a in candidates if all(answers.count(a) >= answers.count(b) for b in candidates)]
    return winners[:1] == [right]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5])
def test_the_majority_of_every_possible_vote(num_samples: int) -> None:
    for answers in product(["7", "12", *UNREADABLE], repeat=num_samples):
        correct = [answer == "7" for answer in answers]
        assert consensus_is_correct(answers, correct, UNREADABLE) == consensus_by_enumeration(answers, "7"), answers


def test_right_answers_agree_however_they_are_written() -> None:
    assert consensus_is_correct(["1/2", "7", "0.5", "7", r"\frac{1}{2}"], [True, False, True, False, True], UNREADABLE)
    # a rule that names no prediction: one right of four is no majority
    assert not consensus_is_correct(["", "", "", ""], [True, False, False, False], UNREADABLE)


@pytest.mark.parametrize(
    ("predictions", "right", "is_right"),
    [
        (["3", "4", "4"], "4", True),
        (["3", "4", "4"], "3", False),
        (["3", "4", "4", "3"], "3", True),  # a tie: the first seen
        (["4", "3", "4", "3"], "3", False),
        ([NO_ANSWER, NO_ANSWER, "3"], "3", True),
        ([TIMED_OUT, NO_ANSWER, TIMED_OUT, "3"], "3", True),
        ([NO_ANSWER, NO_ANSWER], "3", False),
    ],
)
def test_consensus_is_right_when_its_answer_is(predictions: list[str], right: str, is_right: bool) -> None:
    correct = [prediction == right for prediction in predictions]
    assert consensus_is_correct(predictions, correct, UNREADABLE) is is_right


@pytest.mark.parametrize("scores", [[0.0, 1.0, 0.25, 0.5, 0.75], [0.0, 0.0, 1.0, 1.0, 0.3], [1.0, 0.0, 0.0, 0.0, 0.0]])
def test_the_interval_is_that_of_all_resamples(scores: list[float]) -> None:
    means = [np.mean(resample) for resample in product(scores, repeat=len(scores))]
    exact = np.quantile(means, [0.025, 0.975])
    # the steps between neighbouring means are up to 0.2 wide, sampling moves the ends by one small step at most
    np.testing.assert_allclose(bootstrap_interval(np.array(scores), seed=0), exact, atol=0.011)


def test_the_interval_of_many_problems_is_nearly_normal() -> None:
    scores = np.random.default_rng(1).random(400)
    half_width = 1.96 * scores.std() / math.sqrt(400)
    low, high = bootstrap_interval(scores, seed=3)
    assert (low, high) == (
        pytest.approx(scores.mean() - half_width, abs=1.5e-3),
        pytest.approx(scores.mean() + half_width, abs=1.5e-3),
    )


def test_the_interval_depends_on_the_seed_alone() -> None:
    scores = np.random.default_rng(1).random(50)
    assert bootstrap_interval(scores, seed=3) == bootstrap_interval(scores.copy(), seed=3)
    assert bootstrap_interval(scores, seed=3) != bootstrap_interval(scores, seed=4)


def test_equal_problems_have_an_interval_without_width() -> None:
    assert bootstrap_interval(np.full(9, 0.5), seed=0) == (0.5, 0.5)


def test_a_row_of_the_table_holds_a_problem() -> None:
    samples = [generation(0, 2), generation(5, 3, "length"), generation(1, 1), generation(1, 4)]
    rows = judge_problems(PROMPTS[:2], samples, judge, decode)
    assert rows[0] == ProblemResult(
        uid="held_out/0",
        data_source="arithmetic",
        ground_truth="0",
        predictions=("00", "555"),
        correct=(True, False),
        num_tokens=(2, 3),
        truncated=(False, True),
        reflections=(Reflection(False, False, False),) * 2,
        unjudged=(False, False),
    )
    assert rows[1].correct == (True, True)


def result(predictions: str, ground_truth: str) -> ProblemResult:
    return ProblemResult(
        uid=ground_truth,
        data_source="",
        ground_truth=ground_truth,
        predictions=tuple(predictions),
        correct=tuple(prediction == ground_truth for prediction in predictions),
        num_tokens=(10,) * len(predictions),
        truncated=(True, *(False,) * (len(predictions) - 1)),
        reflections=tuple(Reflection(prediction in "12", False, prediction == "1") for prediction in predictions),
        unjudged=(False,) * len(predictions),
    )


FOUR_PROBLEMS = [result("2211", "1"), result("3313", "3"), result("-44-", "4"), result("5678", "9")]
ESTIMATES = {
    "avg@4": (2 + 3 + 2 + 0) / 16,
    "cons@4": 2 / 4,
    "pass@2": pytest.approx((5 / 6 + 1 + 5 / 6 + 0) / 4),  # of the 6 pairs, 1 of two right ones holds none
    "pass@4": 3 / 4,
}
REFLECTIONS = {"verifies_frac": 5 / 16, "rederives_frac": 0.0, "corrects_frac": 3 / 16, "reflects_frac": 5 / 16}


def split_intervals(metrics: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    ends = {name: value for name, value in metrics.items() if name.endswith(("_low", "_high"))}
    return {name: value for name, value in metrics.items() if name not in ends}, ends


def test_a_summary_by_hand() -> None:
    points, ends = split_intervals(summarize(FOUR_PROBLEMS, "-", 0))
    assert points == ESTIMATES | REFLECTIONS | {"mean_response_tokens": 10.0, "truncated_frac": 0.25, "unjudged": 0}
    for name in ESTIMATES:
        assert 0 <= ends[f"{name}_low"] < points[name] < ends[f"{name}_high"] <= 1


def test_a_run_records_the_estimates_where_there_are_several_samples() -> None:
    points, ends = split_intervals(run_metrics(FOUR_PROBLEMS, "-", 0))
    problem_means = np.array([0.5, 0.75, 0.5, 0.0])
    sampled = {
        "sampled_accuracy": ESTIMATES["avg@4"],
        "sampled_accuracy_stderr": pytest.approx(problem_means.std() / 2),
        "sampled_mean_response_tokens": 10.0,
        "sampled_truncated_frac": 0.25,
        "sampled_unjudged": 0,
    }
    assert points == sampled | ESTIMATES | REFLECTIONS
    assert len(ends) == 8
    one_sample = run_metrics([result("1", "1"), result("2", "1")], "-", 0)
    assert one_sample.keys() == sampled.keys() | REFLECTIONS.keys()
    assert one_sample["sampled_accuracy"] == 0.5


def test_texts_are_counted_by_what_they_say() -> None:
    texts = ["1. Wait, let me verify.", "1", "0. Another way: 0", "0"]
    samples = [generation(i, 1) for i in range(4)]
    always_right = [Judgement(1.0, 1.0, "1")] * 4
    rows = judge_problems(PROMPTS[:2], samples, lambda *_: always_right, lambda ids: texts[ids[0]])
    assert rows[0].reflections == (Reflection(True, False, True), Reflection(False, False, False))
    assert rows[1].reflections == (Reflection(False, True, False), Reflection(False, False, False))


def test_the_table_is_one_line_a_problem(tmp_path: Path) -> None:
    write_results(tmp_path / "new" / "set.jsonl", FOUR_PROBLEMS)
    lines = (tmp_path / "new" / "set.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[1]) == {
        "uid": "3",
        "data_source": "",
        "ground_truth": "3",
        "predictions": ["3", "3", "1", "3"],
        "correct": [True, True, False, True],
        "num_tokens": [10] * 4,
        "truncated": [True, False, False, False],
        "unjudged": [False, False, False, False],
        "reflections": [{"verifies": c, "rederives": False, "corrects": c} for c in (False, False, True, False)],
    }


@pytest.mark.parametrize("predictions", [[], ["12", "123"], [""]])
def test_a_summary_of_unequal_or_no_samples_is_refused(predictions: list[str]) -> None:
    with pytest.raises(ValueError, match="results: problems have .* samples; give each the same number"):
        metrics_at_k([result(answers, "1") for answers in predictions], UNREADABLE, seed=0)
