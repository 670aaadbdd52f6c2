"""Finished models, outside of a run: on named sets of problems, or on the held-out problems of their run."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from fipo_megatron.config.load import load_config
from fipo_megatron.config.problems import DataConfig, DataFileConfig
from fipo_megatron.config.schema import Config, RuleName
from fipo_megatron.data.encoding import PromptEncoder, load_prompt_encoder
from fipo_megatron.data.load import load_evaluation_set, load_evaluation_sets
from fipo_megatron.data.readers import ReadResult
from fipo_megatron.data.run_prompts import evaluation_rules, evaluation_sets
from fipo_megatron.data.sources import rule_of_set
from fipo_megatron.evaluation.protocol import ProblemResult, accuracy_metrics, judge_problems, summarize, write_results
from fipo_megatron.evaluation.sets import published_figures
from fipo_megatron.model.platform import resolve_platform
from fipo_megatron.observability.live_panel import format_duration
from fipo_megatron.observability.progress import Progress
from fipo_megatron.reward.judge import UNREADABLE, make_reward, make_rewards
from fipo_megatron.rollout.collect import EVALUATION_BATCH, make_requests
from fipo_megatron.rollout.hf import HfEngine
from fipo_megatron.rollout.stream import in_request_order
from fipo_megatron.rollout.vllm import VllmEngine, vllm_environment
from fipo_megatron.trainer.run import load_decode
from fipo_megatron.types import Judge, Prompt, SamplingSettings

DEFAULT_RESPONSE_TOKENS = 20480  # of a model that has the positions, as in the paper


@dataclass(frozen=True)
class FinishedModel:
    """A Hugging Face folder, and the settings of the run that it is from, or else the defaults."""

    name: str
    folder: Path
    config: Config
    out: Path  # where results go unless another folder is given
    max_response_tokens: int | None  # the run's limit


@dataclass(frozen=True)
class BenchmarkSettings:
    """How sets are sampled and judged."""

    samples_per_problem: int
    temperature: float
    top_p: float
    engine: Literal["vllm", "hf"]
    seed: int
    rule: Literal["dapo", "math_verify"] | None = None  # None: the run's, or dapo; what a set needs comes before
    max_response_tokens: int | None = None  # None: the run's, or as many as the model has positions for
    num_problems: int | None = None  # the first of each set; None: all
    prompt: Literal["auto", "chat", "plain"] | None = None  # None: the run's, or auto
    template: str | None = None  # around {question}; None: the rows' own instruction, or else the run's, or the default


def find_model(path: Path) -> FinishedModel:
    """The model of a run folder or of a Hugging Face folder, this in float32 if its config.json says so, else bfloat16.

    Raises:
        ValueError: the folder is neither, or its run did not end.
    """
    if (path / "config.yaml").is_file():
        config = load_run_config(path)
        limit = config.rollout.max_response_tokens
        return FinishedModel(path.resolve().name, path / "hf", config, path / "evaluation", limit)
    if (path / "config.json").is_file():
        values = _read_hf_config(path)
        is_float32 = "float32" in (values.get("dtype"), values.get("torch_dtype"))
        config = Config.model_validate({"model": {"path": str(path), "dtype": "float32" if is_float32 else "bfloat16"}})
        return FinishedModel(path.resolve().name, path, config, path / "evaluation", None)
    raise ValueError(f"{path} is neither a run folder (config.yaml) nor a Hugging Face folder (config.json)")


def load_run_config(run_folder: Path) -> Config:
    """The configuration of a run that ended.

    Raises:
        ValueError: the folder is not that of one.
    """
    if not (run_folder / "config.yaml").is_file():
        raise ValueError(f"{run_folder} is no run folder (config.yaml); a model of no run is evaluated with --sets")
    if not (run_folder / "hf" / "config.json").is_file():
        raise ValueError(
            f"{run_folder} has no hf/ folder: give the folder of a run that ended, e.g. runs/quickstart_cpu-seed0"
        )
    return load_config(run_folder / "config.yaml")


def evaluate_held_out(run_folder: Path) -> tuple[float, list[RuleName]]:
    """Greedy accuracy of a run's `hf/` folder on its held-out problems, by transformers alone, and its rules.

    Raises:
        ValueError: the folder is not that of a run that ended.
    """
    config = load_run_config(run_folder)
    encoder = load_prompt_encoder(run_folder / "hf", config.data)
    files = load_evaluation_sets(config.data)
    sets, rules = evaluation_sets(config, files, encoder), evaluation_rules(config, files)
    prompts = [prompt for prompts in sets.values() for prompt in prompts]
    engine = HfEngine(run_folder / "hf", config, load_weights=True)
    greedy = SamplingSettings(temperature=0.0, top_p=1.0, max_response_tokens=config.rollout.max_response_tokens)
    requests = make_requests(prompts, 1, config.seed, EVALUATION_BATCH)
    generations = in_request_order(chain.from_iterable(engine.generate(requests, greedy)), len(requests))
    decode, results = load_decode(run_folder / "hf"), list[ProblemResult]()
    with ExitStack() as stack:
        rewards = make_rewards(config.reward, rules.values(), config.rollout.max_response_tokens)
        for reward in rewards.values():
            stack.enter_context(closing(reward))
        for name, of_set in sets.items():
            responses = generations[len(results) : len(results) + len(of_set)]
            results += judge_problems(of_set, responses, rewards[rules[name]].with_limit(len(of_set)), decode)
    return accuracy_metrics(results)["accuracy"], sorted(set(rules.values()))


class Benchmark:
    """A model to be measured on sets of problems; a context manager, inside of which the model is in memory."""

    _engine: VllmEngine | HfEngine

    def __init__(
        self, model: FinishedModel, files: Mapping[str, Path], settings: BenchmarkSettings, progress: Progress
    ) -> None:
        """Reads the sets.

        Raises:
            ValueError: a file can't be used, or responses as long as asked don't fit the model.
        """
        self._model, self._files, self._settings, self._progress = model, files, settings, progress
        self._data = data_config(model.config.data, settings)
        encoder = load_prompt_encoder(model.folder, self._data)
        self._is_chat = encoder.is_chat
        self._rules: dict[str, RuleName] = {}
        self._sets = self._load_sets(encoder)
        longest = max(len(prompt.token_ids) for prompts in self._sets.values() for prompt in prompts)
        self._config = fit_config(model, longest, settings)
        self._decode = load_decode(model.folder)

    def __enter__(self) -> Self:
        with self._progress.status(f"loading {self._model.name}"):
            self._engine = _make_engine(self._model.folder, self._config, self._settings.engine)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self._engine
        gc.collect()

    def measure(self, name: str, out: Path) -> dict[str, Any]:
        """The summary of a set: what was measured how, the metrics of `protocol.summarize`, and published figures.

        Writes `<set>.jsonl` to the folder, one line a problem, and `<set>.json`, the summary.
        """
        config = self._config.reward.model_copy(update={"rule": self._rules[name]})
        with closing(make_reward(config, self._config.rollout.max_response_tokens)) as reward:
            num_responses = len(self._sets[name]) * self._settings.samples_per_problem
            results = self._sample(name, reward.with_limit(num_responses))
        summary = {
            "set": name,
            "file": str(self._files[name]),
            "num_problems": len(results),
            "settings": self._describe_settings() | {"rule": self._rules[name]},
            "metrics": summarize(results, UNREADABLE, self._settings.seed),
            "published": [dataclasses.asdict(figures) for figures in published_figures(name)],
        }
        write_results(out / f"{name}.jsonl", results)
        (out / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return summary

    def _load_sets(self, encoder: PromptEncoder) -> dict[str, list[Prompt]]:
        sets = {}
        for name, path in self._files.items():
            result = load_evaluation_set(DataFileConfig(path=str(path)))
            if self._settings.template is not None:
                check_bare(result)
            self._rules[name] = self._choose_rule(name, result)
            problems = result.problems[: self._settings.num_problems]
            # named as in the evaluation of a run: so both sample with the same seeds
            sets[name] = [encoder.prompt(problem, f"{name}/{problem.uid}") for problem in problems]
        return sets

    def _choose_rule(self, name: str, result: ReadResult) -> RuleName:
        """The rule that judges a set; a ValueError if the one that was asked for can't read the set's answers."""
        asked = self._settings.rule or self._model.config.reward.rule
        rule = rule_of_set(name, result, asked)
        if rule == asked:
            return rule
        if self._settings.rule is not None:
            raise ValueError(
                f"--rule {asked}: the answers of {name} are not plain numbers, right ones would count as wrong; leave "
                f"the option out, or give --rule {rule}"
            )
        self._progress.note(f"{name} is judged by {rule}: {asked} can't read its answers")
        return rule

    def _sample(self, name: str, judge: Judge) -> list[ProblemResult]:
        """Judged samples of every problem, some problems at a time, so that progress shows."""
        settings, config, prompts = self._settings, self._config, self._sets[name]
        sampling = SamplingSettings(settings.temperature, settings.top_p, config.rollout.max_response_tokens)
        size = math.ceil(config.rollout.max_concurrent_sequences / settings.samples_per_problem)
        results: list[ProblemResult] = []
        start = time.perf_counter()
        with self._progress.task(name, math.ceil(len(prompts) / size)) as advance:
            for first in range(0, len(prompts), size):
                part = prompts[first : first + size]
                requests = make_requests(part, settings.samples_per_problem, settings.seed, EVALUATION_BATCH)
                responses = chain.from_iterable(self._engine.generate(requests, sampling))
                generations = in_request_order(responses, len(requests))
                results += judge_problems(part, generations, judge, self._decode)
                left_s = (time.perf_counter() - start) * (len(prompts) / len(results) - 1)
                left = f", about {format_duration(left_s)} left" if left_s else ""
                advance(f"{len(results)} of {len(prompts)} problems{left}")
        return results

    def _describe_settings(self) -> dict[str, Any]:
        settings, config = self._settings, self._config
        return {
            "model": self._model.name,
            "samples_per_problem": settings.samples_per_problem,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_response_tokens": config.rollout.max_response_tokens,
            "engine": settings.engine,
            "dtype": config.model.dtype,
            "prompt": "chat" if self._is_chat else "plain",
            "template": self._data.template,  # rows with an instruction of their own are given as they are
            "seed": settings.seed,
        }


def data_config(config: DataConfig, settings: BenchmarkSettings) -> DataConfig:
    """How problems are put to the model: as the settings say, else as in its run."""
    asked = {"prompt": settings.prompt, "template": settings.template}
    return config.model_copy(update={key: value for key, value in asked.items() if value is not None})


def check_bare(result: ReadResult) -> None:
    """Raises ValueError if a problem has an instruction of its own: it would not be put into a template."""
    instructed = next((problem for problem in result.problems if problem.has_instruction), None)
    if instructed is not None:
        raise ValueError(
            f"--template: {result.path} has rows with an instruction of their own, e.g. {instructed.uid}; leave the "
            "option out, or give a file of bare questions, as tools/prepare_data.py makes it"
        )


def fit_config(model: FinishedModel, max_prompt_tokens: int, settings: BenchmarkSettings) -> Config:
    """The model's configuration with the limits of this benchmark: room for its longest prompt and for the responses.

    Length penalties and the score of form are left out: they change rewards, not accuracies.

    Raises:
        ValueError: the model has too few positions for them.
    """
    positions = _read_hf_config(model.folder).get("max_position_embeddings")
    if not isinstance(positions, int):
        raise ValueError(f"{model.folder}/config.json has no max_position_embeddings; copy it from the model again")
    room = positions - max_prompt_tokens
    limit = settings.max_response_tokens or model.max_response_tokens or min(DEFAULT_RESPONSE_TOKENS, room)
    if not 0 < limit <= room:
        raise ValueError(
            f"--max-response-tokens {limit}: {model.name} has {positions} positions, the longest prompt takes "
            f"{max_prompt_tokens} of them; give at most {room}"
        )
    rollout = model.config.rollout.model_copy(
        update={"max_prompt_tokens": max_prompt_tokens, "max_response_tokens": limit}
    )
    rule = {} if settings.rule is None else {"rule": settings.rule, "function": None}
    reward = model.config.reward.model_copy(update={"overlong_buffer_tokens": 0, "format_score": 0.0} | rule)
    return model.config.model_copy(update={"rollout": rollout, "reward": reward, "seed": settings.seed})


def _make_engine(folder: Path, config: Config, engine: Literal["vllm", "hf"]) -> VllmEngine | HfEngine:
    if engine == "hf":
        return HfEngine(folder, config, load_weights=True)
    os.environ.update(vllm_environment(config, on_cpu=resolve_platform(config.platform).name == "cpu"))
    return VllmEngine(folder, config, load_weights=True)


def _read_hf_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{folder}/config.json is not a JSON object; copy it from the model again")
    return values
