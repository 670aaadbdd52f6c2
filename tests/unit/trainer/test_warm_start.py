from __future__ import annotations

import numpy as np

from fipo_megatron.config.schema import Config, WarmStartConfig
from fipo_megatron.data.tasks.arithmetic import ArithmeticTask
from fipo_megatron.trainer.warm_start import base_policy_folder, learning_rate, make_trace_batch


def test_traces_are_prompts_then_responses_that_end() -> None:
    task = ArithmeticTask(Config().task)
    batch = make_trace_batch(task, np.random.default_rng(0), 5)
    for i in range(5):
        ids = batch.token_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        assert ids[-1] == task.vocabulary.eos_token_id
        text = task.vocabulary.decode(ids)
        assert text[: batch.prompt_lens[i]].endswith("=")
        assert "\nAnswer: " in text


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    settings = WarmStartConfig(steps=300, warmup_steps=20, lr=1.0)
    assert learning_rate(settings, 0) == 0.05
    assert learning_rate(settings, 19) > 0.98
    assert 0.1 <= learning_rate(settings, 299) < 0.101


def test_the_cache_tells_apart_everything_the_weights_depend_on() -> None:
    base = {"warm_start": {}, "seed": 0}
    same = [base, {**base, "seed": 5}, {**base, "optimizer": {"lr": 1.0}}]
    other = [
        {**base, "warm_start": {"seed": 1}},
        {**base, "task": {"num_digits": 3}},
        {**base, "task": {"name": "chain"}},
        {**base, "parallel": {"tensor": 2}},
        {**base, "model": {"dtype": "float32"}},
    ]
    folders = [base_policy_folder(Config.model_validate(values)) for values in [*same, *other]]
    assert len(set(folders[:3])) == 1
    assert len(set(folders)) == 1 + len(other)
