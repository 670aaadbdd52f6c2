"""The rule against the reference vectors, and against further cases computed with the reference implementation."""

import json
from pathlib import Path

import pytest

from fipo_megatron.reward.math_answer import normalize_answer, score_dapo

VECTORS = Path(__file__).parents[2] / "data" / "dapo_rewards.json"
CASES = json.loads(VECTORS.read_text())


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_reference_vector(case: dict) -> None:
    verdict = score_dapo(case["response"], case["ground_truth"])
    assert verdict.score == case["score"]
    assert verdict.accuracy == (case["score"] > 0)
    assert verdict.prediction == case["pred"]


def test_vectors_are_those_of_the_reference(shared_dir: Path) -> None:
    assert json.loads((shared_dir / "reference" / "dapo_rewards.json").read_text()) == CASES


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("a square of 5 inches", "of5"),
        ("an apple", "apple"),
        ("banana split", "banansplit"),  # "a " goes wherever it occurs
        (r"\$3,000", "3000"),
        ("1,2,x", "1,2,x"),  # commas go from whole numbers only
        ("-1,000", "-1,000"),
        (r"5\text{ cm}", "5"),
        (r"\mbox{yes}", "yes"),
        (r"1,\text{and}2", "12"),  # a comma is left, and the rest is digits
        (r"3\text{m}", "3"),
        (r"3\text{s}^2", "3^2"),
        (r"\frac34", r"\frac{3}{4}"),
        (r"\frac123", r"\frac{1}{2}3"),
        (r"\sqrt2x", r"\sqrt{2}x"),
        (r"\sqrt{2}", r"\sqrt{2}"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\textbf{7}", "7"),
        (r"\overline{AB}", "AB"),
        (r"so $x=3$ and $y=4$", "4"),  # all before the last "=" goes first
        ("so $3$ and $4$", "3"),  # of several $...$ the first counts
        ("$5.$", "5"),
        (r"10{,}000", "10000"),
        (r"10,\!000", "10000"),
        (r"4^{\circ}", "4"),
        ("4\\;", "4"),
        ("a = b = 7", "7"),
        ("0 5", "05"),
        ("2^{10}", "2^{10}"),
    ],
)
def test_normalisation(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


def test_both_sides_are_normalised() -> None:
    assert score_dapo("Answer: 1000", "1,000").accuracy == 1.0
    assert score_dapo("Answer: 5", "x = 5 cm").accuracy == 1.0


def test_only_the_last_300_characters_are_read() -> None:
    assert score_dapo("Answer: 7" + "\n" * 291, "7").accuracy == 1.0
    assert score_dapo("Answer: 7" + "\n" * 292, "7").prediction == "[INVALID]"


def test_answer_may_follow_on_the_next_line() -> None:
    assert score_dapo("Answer:\n\n34\nbye", "34").accuracy == 1.0


def test_text_is_data_and_never_code() -> None:
    assert score_dapo("Answer: 30 + 4", "34").accuracy == 0.0
    assert score_dapo("Answer: __import__('os').abort()", "34").prediction == "__import__('os').abort()"


@pytest.mark.parametrize("truth", ["units", "points", "", " ", "$", "x =", "[INVALID]", "a [INVALID]"])
@pytest.mark.parametrize("response", ["I say nothing.", "Answer: 7", "Answer: units", "Answer: [INVALID]"])
def test_no_response_is_right_by_saying_nothing(truth: str, response: str) -> None:
    with pytest.raises(ValueError, match="the ground truth .* to DAPO's rule; correct it"):
        score_dapo(response, truth)
