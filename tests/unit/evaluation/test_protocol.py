"""Accuracy and its error on hand-made samples."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from fipo_megatron.evaluation.protocol import accuracy, evaluate
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


def test_evaluate_counts_answers_lengths_and_truncations() -> None:
    generations = [generation(0, 2), generation(1, 4), generation(9, 6, "length"), generation(3, 9)]
    assert evaluate(PROMPTS, generations, judge, decode) == {
        "accuracy": 0.75,
        "accuracy_stderr": pytest.approx(math.sqrt(0.75 * 0.25 / 4)),
        "mean_response_tokens": 5.25,
        "truncated_frac": 0.25,
    }


def test_samples_belong_to_their_prompt() -> None:
    right = [generation(i, 1) for i in range(4) for _ in range(3)]
    assert evaluate(PROMPTS, right, judge, decode)["accuracy"] == 1.0
    assert evaluate(PROMPTS, right[::-1], judge, decode)["accuracy"] == 0.0


@pytest.mark.parametrize("num_generations", [0, 3, 5])
def test_a_wrong_number_of_generations_is_refused(num_generations: int) -> None:
    with pytest.raises(RuntimeError, match=f"{num_generations} responses for 4 prompts"):
        evaluate(PROMPTS, [generation(0, 1)] * num_generations, judge, decode)
