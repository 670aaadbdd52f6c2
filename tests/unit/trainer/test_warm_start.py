from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fipo_megatron.config.schema import Config, WarmStartConfig
from fipo_megatron.data.load import load_files
from fipo_megatron.data.solution_traces import SolutionTraces
from fipo_megatron.data.tasks import make_task
from fipo_megatron.data.tasks.arithmetic import ArithmeticTask
from fipo_megatron.observability.progress import Progress
from fipo_megatron.trainer.warm_start import base_policy_folder, learning_rate, make_base_policy, make_trace_batch


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
        {**base, "task": {"name": "checked_sums"}},
        {**base, "parallel": {"tensor": 2}},
        {**base, "model": {"dtype": "float32"}},
    ]
    configs = [Config.model_validate(values) for values in [*same, *other]]
    folders = [base_policy_folder(config, make_task(config.task)) for config in configs]
    assert len(set(folders[:3])) == 1
    assert len(set(folders)) == 1 + len(other)


def test_the_cache_tells_training_files_apart_by_what_they_hold(tmp_path: Path) -> None:
    folders = []
    for name, answer in (("one", 4), ("copy", 4), ("other", 5)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"question": "How many?", "answer": f"2 + 2 = 4\n#### {answer}"}) + "\n")
        config = Config.model_validate({"warm_start": {}, "data": {"train": str(path)}})
        folders.append(base_policy_folder(config, SolutionTraces(config, load_files(config.data).train)))
    assert folders[0] == folders[1] != folders[2]
    assert folders[0].name.startswith("solutions-")


class ExportingPolicy:
    """A policy without parameters, whose export writes a marker."""

    def __init__(self, marker: str, fails: bool = False) -> None:
        self.marker, self.fails = marker, fails

    async def load(self, *arguments: Any, random_seed: int) -> None:
        pass

    async def supervised_update(self, *arguments: Any) -> float:
        return 1.0

    async def export(self, source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text(self.marker)
        if self.fails:
            raise RuntimeError("a rank died")


def test_two_runs_may_make_one_base_policy(tmp_path: Path) -> None:
    config = Config.model_validate({"warm_start": {"steps": 1}})
    task = make_task(config.task)

    def make(policy: Any) -> None:
        asyncio.run(make_base_policy(config, task, policy, tmp_path, tmp_path / "base", Progress()))

    with pytest.raises(RuntimeError, match="a rank died"):
        make(ExportingPolicy("half", fails=True))
    assert not list(tmp_path.iterdir())
    make(ExportingPolicy("first"))
    make(ExportingPolicy("second"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert (tmp_path / "base" / "config.json").read_text() == "first"
