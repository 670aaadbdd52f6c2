"""The saved tokenizer is loaded back; the share held out is counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fipo_megatron.config.problems import ArithmeticTaskConfig, CheckedSumsTaskConfig, KnightsTaskConfig
from fipo_megatron.data.tasks import make_task
from fipo_megatron.data.tasks.base import Task, hashes_to_held_out

CONFIGS = (ArithmeticTaskConfig(), CheckedSumsTaskConfig(), KnightsTaskConfig(num_people=5))


@pytest.fixture(params=CONFIGS, ids=lambda config: config.name)
def task(request: pytest.FixtureRequest) -> Task[Any]:
    return make_task(request.param)


def test_a_task_is_found_by_its_configuration(task: Task[Any]) -> None:
    assert type(task).__name__.lower() == f"{task.name.replace('_', '')}task"


def test_encode_round_trips_and_refuses_other_characters() -> None:
    vocabulary = make_task(ArithmeticTaskConfig()).vocabulary
    text = "5+8+0=13;4+2+1=07;3+1+0=04;7+5+0=12;\nAnswer: 12473"
    ids = vocabulary.encode(text)
    assert len(ids) == 36 + 1 + 1 + 5
    assert vocabulary.decode([*ids, vocabulary.eos_token_id, vocabulary.pad_token_id]) == text
    for text in ["1-2", "Answer:", "<eos>"]:
        with pytest.raises(ValueError, match="cannot write"):
            vocabulary.encode(text)


def test_traces_of_training_problems_end_in_their_answer(task: Task[Any]) -> None:
    rng, vocabulary = np.random.default_rng(0), task.vocabulary
    for _ in range(50):
        prompt, response = task.draw_trace(rng)
        assert response[-1] == vocabulary.eos_token_id
        assert len(prompt) <= task.max_prompt_tokens
        assert len(response) <= task.max_trace_tokens
        assert "\nAnswer: " in vocabulary.decode(response)


def test_train_and_held_out_problems_are_disjoint(task: Task[Any]) -> None:
    held_out = {task.prompt_text(problem) for problem in task.held_out_problems(64)}
    assert len(held_out) == 64
    rng = np.random.default_rng(0)
    assert not held_out & {task.prompt_text(task.train_problem(rng)) for _ in range(2000)}
    assert held_out == {task.prompt_text(problem) for problem in task.held_out_problems(64)}


def test_a_share_of_texts_is_held_out() -> None:
    share = np.mean([hashes_to_held_out(f"{i}+7=", 0.1) for i in range(20_000)])
    assert abs(share - 0.1) < 4 * (0.09 / 20_000) ** 0.5


def test_limits_below_the_longest_problem_are_refused(task: Task[Any]) -> None:
    prompt_tokens, response_tokens = task.max_prompt_tokens, task.max_trace_tokens
    task.check_limits(prompt_tokens, response_tokens)
    with pytest.raises(ValueError, match=rf"rollout.max_prompt_tokens: .* set it to {prompt_tokens}"):
        task.check_limits(prompt_tokens - 1, response_tokens)
    with pytest.raises(ValueError, match=rf"rollout.max_response_tokens: .* set it to {response_tokens}"):
        task.check_limits(prompt_tokens, response_tokens - 1)


@pytest.fixture(params=["alone", "beside a Qwen2 model"])
def saved_tokenizer(request: pytest.FixtureRequest, task: Task[Any], tmp_path: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    task.vocabulary.write_tokenizer(tmp_path)
    if request.param != "alone":
        model = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": task.vocabulary.size}
        (tmp_path / "config.json").write_text(json.dumps(model))
    return transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_saved_tokenizer_has_the_tasks_tokens(task: Task[Any], saved_tokenizer: Any) -> None:
    vocabulary = task.vocabulary
    assert len(saved_tokenizer) == vocabulary.size == len(vocabulary.tokens) == 32
    assert saved_tokenizer.eos_token_id == vocabulary.eos_token_id
    assert saved_tokenizer.pad_token_id == vocabulary.pad_token_id
    for i, token in enumerate(vocabulary.tokens):
        assert saved_tokenizer.decode([i]) == token


def test_saved_tokenizer_agrees_with_encode_and_decode(task: Task[Any], saved_tokenizer: Any) -> None:
    rng, vocabulary = np.random.default_rng(0), task.vocabulary
    texts = [task.noisy_trace(rng, task.train_problem(rng)) for _ in range(20)]
    texts += [task.prompt_text(task.train_problem(rng)) for _ in range(20)]
    texts += ["".join(rng.choice(vocabulary.symbols, size=30)) for _ in range(100)]
    for text in texts:
        ids = list(vocabulary.encode(text))
        assert saved_tokenizer.encode(text) == ids
        padded = np.array([*ids, vocabulary.eos_token_id, vocabulary.pad_token_id], np.int32)
        assert saved_tokenizer.decode(padded, skip_special_tokens=True) == text == vocabulary.decode(padded)
