"""Finished models on sets of problems, outside of a run: each problem sampled k times, judged, tabled and summed up."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fipo_megatron.config.load import load_config
from fipo_megatron.config.schema import Config, DataFileConfig, RewardConfig
from fipo_megatron.data.encoding import PromptEncoder, load_prompt_encoder
from fipo_megatron.data.load import load_problems
from fipo_megatron.evaluation.protocol import ProblemResult, judge_problems, summarize, write_results
from fipo_megatron.evaluation.sets import published_figures
from fipo_megatron.model.platform import resolve_platform
from fipo_megatron.observability.progress import Progress
from fipo_megatron.reward.judge import UNREADABLE, Reward, make_reward
from fipo_megatron.rollout.collect import EVALUATION_BATCH, make_requests
from fipo_megatron.rollout.hf import HfEngine
from fipo_megatron.rollout.vllm import VllmEngine, vllm_environment
from fipo_megatron.trainer.run import load_tokenizer
from fipo_megatron.types import Decode, Prompt, SamplingSettings

DEFAULT_RESPONSE_TOKENS = 20480  # of a model that has the positions, as in the paper


@dataclass(frozen=True)
class FinishedModel:
    """A Hugging Face folder, and the settings of the run that it is from, or else the defaults."""

    name: str
    folder: Path
    config: Config
    out: Path  # where results go unless another folder is given
    is_run: bool


@dataclass(frozen=True)
class BenchmarkSettings:
    """How sets are sampled and judged."""

    samples_per_problem: int
    temperature: float
    top_p: float
    engine: Literal["vllm", "hf"]
    seed: int
    rule: Literal["dapo", "math_verify"] | None = None  # None: the run's, or dapo
    max_response_tokens: int | None = None  # None: the run's, or as many as the model has positions for
    num_problems: int | None = None  # the first of each set; None: all

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.samples_per_problem > 1:
            raise ValueError(
                f"--k {self.samples_per_problem}: at temperature 0 all samples of a problem are the same; use --greedy"
            )


def find_model(path: Path) -> FinishedModel:
    """The model of a run folder, or that of a Hugging Face folder, in the type that its weights have (16 bits: bfloat16).

    Raises:
        ValueError: the folder is neither, or its run did not end.
    """
    if (path / "config.yaml").is_file():
        if not (path / "hf" / "config.json").is_file():
            raise ValueError(f"{path} has no hf/ folder: give the folder of a run that ended")
        config = load_config(path / "config.yaml")
        return FinishedModel(path.resolve().name, path / "hf", config, path / "evaluation", is_run=True)
    if (path / "config.json").is_file():
        values = _read_hf_config(path)
        is_float32 = "float32" in (values.get("dtype"), values.get("torch_dtype"))
        config = Config.model_validate(
            {"model": {"path": str(path), "dtype": "float32" if is_float32 else "bfloat16"}}
        )
        return FinishedModel(path.resolve().name, path, config, path / "evaluation", is_run=False)
    raise ValueError(f"{path} is neither a run folder (config.yaml) nor a Hugging Face folder (config.json)")


def load_sets(
    model: FinishedModel, files: Mapping[str, Path], num_problems: int | None, encoder: PromptEncoder, progress: Progress
) -> dict[str, list[Prompt]]:
    """The prompts of each set; rows that can't be read are noted.

    Raises:
        ValueError: a file can't be used.
    """
    sets = {}
    for name, path in files.items():
        found = load_problems(DataFileConfig(path=str(path)), model.config.data.max_corrupt_frac)
        if found.rejected:
            progress.note(found.describe_rejected())
        # named as in a run's evaluation: the same seeds
        sets[name] = [encoder.prompt(problem, f"{name}/{problem.uid}") for problem in found.problems[:num_problems]]
    return sets


def benchmark(
    model: FinishedModel, files: Mapping[str, Path], settings: BenchmarkSettings, out: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """The summary of each set: problems, settings, metrics of `protocol.summarize` and published figures.

    Writes `<set>.jsonl`, one problem a line, and `<set>.json`, the summary, when a set is done.

    Raises:
        ValueError: a file can't be used, or responses as long as asked don't fit the model.
    """
    encoder = load_prompt_encoder(model.folder, model.config.data)
    sets = load_sets(model, files, settings.num_problems, encoder, progress)
    config = _engine_config(model, sets, settings)
    reward = make_reward(_reward_config(model.config.reward, settings.rule), config.rollout.max_response_tokens)
    out.mkdir(parents=True, exist_ok=True)
    with progress.status(f"loading {model.name}"):
        engine = _make_engine(model.folder, config, settings.engine)
    how = _describe(model, config, settings, encoder)
    summaries = {}
    try:
        for name, prompts in sets.items():
            results = _sample_set(name, prompts, engine, config, settings, reward, _decode(model), progress)
            write_results(out / f"{name}.jsonl", results)
            summaries[name] = {
                "set": name,
                "file": str(files[name]),
                "num_problems": len(results),
                "settings": how,
                "metrics": summarize(results, UNREADABLE, settings.seed),
                "published": [dataclasses.asdict(entry) for entry in published_figures(name)],
            }
            (out / f"{name}.json").write_text(json.dumps(summaries[name], indent=2) + "\n", encoding="utf-8")
    finally:
        reward.close()
    return summaries
