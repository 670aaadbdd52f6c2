"""The stream of prompts is a function of seed and position alone."""

import json

import pytest

from fipo_megatron.config.problems import ArithmeticTaskConfig
from fipo_megatron.data.prompts import PromptSampler, held_out_prompts
from fipo_megatron.data.tasks.arithmetic import ArithmeticTask
from fipo_megatron.types import Prompt

TASK = ArithmeticTask(ArithmeticTaskConfig())
ENCODE = TASK.vocabulary.encode


def operands(prompt: Prompt) -> tuple[int, int]:
    a, b = TASK.vocabulary.decode(prompt.token_ids).removesuffix("=").split("+")
    return int(a), int(b)


def test_prompts_hold_the_problem_and_its_answer() -> None:
    for prompt in [
        *PromptSampler(TASK, ENCODE, seed=0).next_prompts(50),
        *held_out_prompts(TASK, ENCODE, 50),
    ]:
        assert prompt.ground_truth == str(sum(operands(prompt)))
        assert prompt.data_source == "arithmetic"
        assert len(prompt.token_ids) == TASK.max_prompt_tokens


def test_stream_does_not_depend_on_how_it_is_cut() -> None:
    whole, parts = (
        PromptSampler(TASK, ENCODE, seed=3),
        PromptSampler(TASK, ENCODE, seed=3),
    )
    assert whole.next_prompts(10) == parts.next_prompts(3) + parts.next_prompts(0) + parts.next_prompts(7)


def test_uids_are_unique_and_problems_vary() -> None:
    prompts = PromptSampler(TASK, ENCODE, seed=0).next_prompts(500) + held_out_prompts(TASK, ENCODE, 500)
    assert len({prompt.uid for prompt in prompts}) == 1000
    assert len({prompt.token_ids for prompt in prompts}) == 1000


def test_seeds_give_other_problems() -> None:
    first, second = (PromptSampler(TASK, ENCODE, seed).next_prompts(100) for seed in (0, 1))
    assert not {p.token_ids for p in first} & {p.token_ids for p in second}


def test_resumed_stream_goes_on_where_it_was_left() -> None:
    sampler, resumed = (
        PromptSampler(TASK, ENCODE, seed=5),
        PromptSampler(TASK, ENCODE, seed=5),
    )
    sampler.next_prompts(37)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert resumed.next_prompts(20) == sampler.next_prompts(20)


def test_state_of_another_seed_is_refused() -> None:
    state = PromptSampler(TASK, ENCODE, seed=5).state_dict()
    with pytest.raises(ValueError, match=r"seed: 6 differs from 5.*resume with seed=5"):
        PromptSampler(TASK, ENCODE, seed=6).load_state_dict(state)


def test_held_out_prompts_are_the_tasks_problems() -> None:
    assert [operands(prompt) for prompt in held_out_prompts(TASK, ENCODE, 30)] == TASK.held_out_problems(30)
