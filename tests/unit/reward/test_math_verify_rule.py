"""The symbolic rule in its worker processes: right and wrong answers, tricks, hostile text, and all of GSM8K's form."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fipo_megatron.reward.base import NO_ANSWER, Verdict
from fipo_megatron.reward.math_answer import score_dapo
from fipo_megatron.reward.sandbox import Outcome, WorkerPool

# Never imported here: it is for worker processes.
MODULE = "fipo_megatron.reward.math_verify_rule"
TIMEOUT_S = 1.5


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(f"{MODULE}:score_math_verify", num_workers=1, timeout_s=TIMEOUT_S, memory_bytes=1 << 30)
    yield pool
    pool.close()


def accuracies(pool: WorkerPool, pairs: list[tuple[str, str]]) -> list[float]:
    outcomes = pool.run_many(pairs)
    assert [outcome.value for outcome in outcomes if outcome.kind != "value"] == []
    for verdict in (outcome.value for outcome in outcomes):
        assert verdict.score == 2 * verdict.accuracy - 1
    return [outcome.value.accuracy for outcome in outcomes]


RIGHT = [
    ("Answer: 34", "34"),
    ("Answer: 34.", "34"),
    ("Answer: 3\nAnswer: 34", "34"),
    ("**Answer: 34**", "34"),
    ("**Answer:** 34", "34"),
    ("Answer: $34$ coins", "34"),
    (r"Answer: \$1,034", "1034"),
    ("Answer: we look for x.\nSo it is \\boxed{34}", "34"),
    (r"Answer: \boxed{34}", "34"),
    (r"so \boxed{\frac{68}{2}} it is", "34"),
    (r"Answer: \(\frac{1}{2}\)", "0.5"),
    ("Answer: 1/2", r"\frac12"),
    ("Answer: 50%", r"\frac{1}{2}"),
    (r"Answer: $\sqrt{8}$", r"2\sqrt{2}"),
    ("Answer: $(x+1)^2$", "x^2 + 2x + 1"),
    (r"Answer: $\{2, 1\}$", r"\{1, 2\}"),
    (r"Answer: $\begin{pmatrix}1&2\\3&4\end{pmatrix}$", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("Answer: x = 34", "34"),
]
WRONG = [
    ("Answer: 35", "34"),
    ("Answer: 34\nAnswer: 35", "34"),
    ("34", "34"),
    ("Answer: 33 or 34", "34"),
    ("Answer: 33, 34", "34"),
    (r"Answer: $\{33, 34\}$", "34"),
    ("Answer: $33$ or $34$", "34"),
    (r"\boxed{33}\boxed{34} Answer: 33", "34"),
    (r"\boxed{34} and then \boxed{33}", "34"),
    (r"\boxed{34", "34"),
    (r"Answer: \pm 34", "34"),
    (r"Answer: $[0, 100]$", "34"),
    (r"Answer: $x \ge 34$", "34"),
    (r"Answer: $\mathbb{R}$", "34"),
    ("Answer: x", "34"),
    (r"Answer: $\infty$", "34"),
    (r"Answer: $\frac{0}{0}$", "34"),
    ("Answer: 34.001", "34"),
    ("Answer:", "34"),
    ("", "34"),
]


def test_right_and_wrong_answers(pool: WorkerPool) -> None:
    judged = accuracies(pool, RIGHT + WRONG)
    assert [pair for pair, is_right in zip(RIGHT, judged, strict=False) if not is_right] == []
    assert [pair for pair, is_right in zip(WRONG, judged[len(RIGHT) :], strict=True) if is_right] == []


def test_the_prediction_is_the_answer_as_written(pool: WorkerPool) -> None:
    pairs = [(r"Answer:  \frac{1}{2} ", "0.5"), (r"is \boxed{\frac{1}{2}}.", "0.5"), ("is 0.5", "0.5")]
    predictions = [outcome.value.prediction for outcome in pool.run_many(pairs)]
    assert predictions == [r"\frac{1}{2}", r"\frac{1}{2}", NO_ANSWER]


def test_a_ground_truth_that_is_no_mathematics_is_an_error(pool: WorkerPool) -> None:
    outcome = pool.run_many([("Answer: 1", "@@#")])[0]
    assert outcome.kind == "error"
    assert outcome.value.startswith("ValueError: the ground truth '@@#' cannot be read")


def test_the_library_evaluates_numbers_alone() -> None:
    code = ["Integer (34 )", "Float ('3.5' )", "Integer (__import__ ('os').getpid ())", "Symbol ('x' )", "print (1 )"]
    pool = WorkerPool(f"{MODULE}:_make_number", num_workers=1, timeout_s=5, memory_bytes=1 << 30)
    outcomes = pool.run_many([(each,) for each in code])
    pool.close()
    assert [str(outcome.value) for outcome in outcomes[:2]] == ["34", "3.50000000000000"]
    assert all("must not be evaluated" in outcome.value for outcome in outcomes[2:])


HANGS = {
    "power_tower": "Answer: 9^{9^{9^{9}}}",
    "nested_powers": "Answer: $(((9^9)^9)^9)^{99999999}$",
    "factorial": "Answer: 99999999!",
    "open_braces_within_reach": "Answer: $" + "{" * 1900 + "1$",
}
HARMLESS = {
    "python_power_tower": "Answer: 9**9**9**9",
    "plain_nested_powers": "Answer: (((9^9)^9)^9)",
    "megabyte_of_latex": "Answer: $" + r"\frac{1}{2}+" * 90_000 + "1$",
    "megabyte_of_open_fractions": "Answer: " + r"\frac{" * 170_000,
    "open_braces": "Answer: " + "{" * 5000,
    "open_box": r"\boxed{" + "{" * 5000,
    "null_byte": "Answer: 3\x004",
    "lone_surrogate": "Answer: 3\ud800",
}
IMPORTS = [
    "__import__('os').system('touch {canary}')",
    r"\text{{__import__('os').system('touch {canary}')}}",
    "{canary}",
]


def test_hostile_answers_harm_nobody_else(pool: WorkerPool, tmp_path: Path) -> None:
    canary = tmp_path / "CANARY"
    imports = [form.format(canary=canary) for form in IMPORTS]
    texts = [*HARMLESS.values(), *(f"Answer: {text}" for text in imports), *(f"Answer: ${text}$" for text in imports)]
    assert pool.run_many([("Answer: 34", "34")])[0].kind == "value"  # the worker is up
    for text in texts:
        hostile, after = pool.run_many([(text, "34"), ("Answer: 34", "34")])
        assert hostile == Outcome("timeout") or hostile.value.accuracy == 0
        assert after == Outcome("value", Verdict(1.0, 1.0, "34"))
    assert not canary.exists()


@pytest.mark.parametrize("text", HANGS.values(), ids=HANGS.keys())
def test_an_answer_that_hangs_times_out_alone(pool: WorkerPool, text: str) -> None:
    began = time.monotonic()
    hostile, after = pool.run_many([(text, "34"), ("Answer: 34", "34")])
    assert hostile == Outcome("timeout")
    assert after == Outcome("value", Verdict(1.0, 1.0, "34"))
    assert time.monotonic() - began < 20  # with two starts of a worker, on a busy machine


def gsm8k_pairs(shared_dir: Path, shift: int) -> list[tuple[str, str]]:
    """Solutions with `Answer: N + shift` for their `#### N`, and N."""
    pairs = []
    for split in ("train", "test"):
        for line in (shared_dir / "data" / "gsm8k" / f"{split}.jsonl").read_text().splitlines():
            solution, number = json.loads(line)["answer"].rsplit("#### ", 1)
            shifted = str(int(number.replace(",", "")) + shift) if shift else number
            pairs.append((f"{solution}Answer: {shifted}", number))
    assert len(pairs) == 8792
    return pairs


@pytest.mark.parametrize(("shift", "accuracy"), [(0, 1.0), (1, 0.0)])
def test_gsm8k_by_equal_text(shared_dir: Path, shift: int, accuracy: float) -> None:
    assert {score_dapo(*pair).accuracy for pair in gsm8k_pairs(shared_dir, shift)} == {accuracy}


@pytest.mark.parametrize(("shift", "accuracy"), [(0, 1.0), (1, 0.0)])
def test_a_sample_of_gsm8k_by_equal_mathematics(
    pool: WorkerPool, shared_dir: Path, shift: int, accuracy: float
) -> None:
    assert set(accuracies(pool, gsm8k_pairs(shared_dir, shift)[::30])) == {accuracy}
