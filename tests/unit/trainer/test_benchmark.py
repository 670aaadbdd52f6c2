"""What is evaluated, and within which limits; sampling itself is in tests/parity/test_benchmark.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fipo_megatron.config.load import save_config
from fipo_megatron.config.problems import ANSWER_TEMPLATE, DataConfig
from fipo_megatron.config.schema import Config, RewardConfig
from fipo_megatron.data.encoding import PromptEncoder
from fipo_megatron.data.prepare import prepare
from fipo_megatron.data.prepare import write_problems as write_prepared
from fipo_megatron.data.readers import Message, Problem
from fipo_megatron.data.sources import find_source, read_source
from fipo_megatron.observability.progress import Progress
from fipo_megatron.reward import judge
from fipo_megatron.reward.math_verify_rule import score_math_verify
from fipo_megatron.trainer import benchmark
from fipo_megatron.trainer.benchmark import (
    Benchmark,
    BenchmarkSettings,
    data_config,
    evaluate_held_out,
    find_model,
    fit_config,
    load_run_config,
)
from fipo_megatron.types import FinishedResponse, Generation


def settings(**changed: Any) -> BenchmarkSettings:
    return BenchmarkSettings(
        **({"samples_per_problem": 2, "temperature": 1, "top_p": 0.7, "engine": "hf", "seed": 3} | changed)
    )


def make_model(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 4096} | values))
    return folder


def make_run(folder: Path, **sections: Any) -> Path:
    make_model(folder / "hf")
    save_config(Config.model_validate(sections), folder / "config.yaml")
    return folder


def test_a_run_keeps_its_settings_and_a_model_gets_defaults(tmp_path: Path) -> None:
    run = find_model(make_run(tmp_path / "run", rollout={"max_response_tokens": 77}, model={"dtype": "float32"}))
    assert (run.name, run.folder, run.out) == ("run", tmp_path / "run" / "hf", tmp_path / "run" / "evaluation")
    assert (run.max_response_tokens, run.config.model.dtype) == (77, "float32")
    model = find_model(make_model(tmp_path / "model", torch_dtype="float16"))
    assert (model.name, model.folder, model.out) == ("model", tmp_path / "model", tmp_path / "model" / "evaluation")
    assert (model.max_response_tokens, model.config.model.dtype) == (None, "bfloat16")
    assert find_model(make_model(tmp_path / "other", dtype="float32")).config.model.dtype == "float32"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a run folder \(config.yaml\) nor a Hugging Face folder"):
        find_model(tmp_path)
    save_config(Config(), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="has no hf/ folder"):
        find_model(tmp_path)
    with pytest.raises(ValueError, match="is no run folder .* evaluated with --sets"):
        load_run_config(make_model(tmp_path / "model"))
    (tmp_path / "model" / "config.json").write_text("[")
    with pytest.raises(ValueError, match="config.json is not a JSON object"):
        find_model(tmp_path / "model")


def test_responses_get_the_room_that_is_left(tmp_path: Path) -> None:
    model, run = find_model(make_model(tmp_path / "model")), find_model(make_run(tmp_path / "run"))
    limits = fit_config(model, 96, settings()).rollout
    assert (limits.max_prompt_tokens, limits.max_response_tokens) == (96, 4000)
    assert fit_config(model, 96, settings(max_response_tokens=10)).rollout.max_response_tokens == 10
    large = find_model(make_model(tmp_path / "large", max_position_embeddings=131072))
    assert fit_config(large, 96, settings()).rollout.max_response_tokens == 20480
    for subject, limit, options in ((model, 4001, {"max_response_tokens": 4001}), (run, 20480, {}), (model, 0, {})):
        with pytest.raises(ValueError, match=f"--max-response-tokens {limit}: .* has 4096 positions"):
            fit_config(subject, 96 if limit else 4096, settings(**options))


def test_accuracy_is_judged_without_what_only_changes_rewards(tmp_path: Path) -> None:
    reward = {"rule": "math_verify", "overlong_buffer_tokens": 500, "format_score": 0.5, "timeout_s": 9.0}
    run = find_model(make_run(tmp_path / "run", reward=reward, rollout={"max_response_tokens": 600}))
    judged = fit_config(run, 10, settings(max_response_tokens=100)).reward
    assert (judged.rule, judged.timeout_s) == ("math_verify", 9.0)
    assert (judged.overlong_buffer_tokens, judged.format_score) == (0, 0.0)
    judged = fit_config(run, 10, settings(rule="dapo", max_response_tokens=100)).reward
    assert (judged.rule, judged.timeout_s, judged.format_score) == ("dapo", 9.0, 0.0)


def test_another_rule_keeps_how_the_run_judges(tmp_path: Path) -> None:
    limits = {"num_workers": 7, "timeout_s": 9.0, "memory_gib": 3.0, "max_unjudged_frac": 0.5}
    reward = {"rule": "custom", "function": "mine.py:judge", **limits}
    run = find_model(make_run(tmp_path / "run", reward=reward))
    judged = fit_config(run, 10, settings(rule="math_verify", max_response_tokens=100)).reward
    assert judged == RewardConfig(rule="math_verify", **limits)


class Codepoints:
    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def apply_chat_template(self, *arguments: Any, **options: Any) -> str:
        raise NotImplementedError


@pytest.fixture
def codepoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        benchmark,
        "load_prompt_encoder",
        lambda folder, config: PromptEncoder(Codepoints(), config.prompt, config.template),
    )
    monkeypatch.setattr(benchmark, "load_decode", lambda folder: str)


def write_problems(path: Path, *more: str) -> Path:
    path.write_text("\n".join([json.dumps({"question": "1 + 1?", "answer": "#### 2"}), *more]))
    return path


@pytest.mark.usefixtures("codepoints")
def test_a_set_with_a_row_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    model = find_model(make_model(tmp_path / "model"))
    files = {"mine": write_problems(tmp_path / "mine.jsonl")}
    Benchmark(model, files, settings(), Progress())
    write_problems(files["mine"], "", "{")
    with pytest.raises(ValueError, match=r"mine.jsonl: 1 of 2 rows can't be read: line 3 is not JSON"):
        Benchmark(model, files, settings(), Progress())


@pytest.mark.usefixtures("codepoints")
def test_a_set_is_judged_by_the_rule_that_its_answers_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(prompts: Any, generations: Any, judge: Any, decode: Any) -> Any:
        judged.append(judge._reward.config.rule)
        raise ReachedError

    judged: list[str] = []
    monkeypatch.setattr(benchmark, "judge_problems", judge)
    monkeypatch.setattr(benchmark, "_make_engine", lambda *_: HalfEngine())
    model = find_model(make_model(tmp_path / "model"))
    files = {name: write_problems(tmp_path / f"{name}.jsonl") for name in ("mine", "hmmt_feb_2025")}
    with (tmp_path / "log").open("w") as log, Benchmark(model, files, settings(), Progress(log)) as measured:
        for name in files:
            with pytest.raises(ReachedError):
                measured.measure(name, tmp_path)
    assert judged == ["dapo", "math_verify"]
    assert "hmmt_feb_2025 is judged by math_verify: dapo can't read its answers" in (tmp_path / "log").read_text()
    Benchmark(model, files, settings(rule="math_verify"), Progress())
    monkeypatch.setattr(benchmark, "HfEngine", lambda *_, **options: HalfEngine())
    run = make_run(tmp_path / "run", data={"eval": {"hmmt_feb_2025": str(files["hmmt_feb_2025"])}})
    with pytest.raises(ReachedError):
        evaluate_held_out(run)
    assert judged == ["dapo", "math_verify", "math_verify"]
    with pytest.raises(ValueError, match=r"--rule dapo: the answers of hmmt_feb_2025 .* or give --rule math_verify"):
        Benchmark(model, files, settings(rule="dapo"), Progress())


class HalfEngine:
    """Answers 1/2."""

    def generate(self, requests: Sequence[Any], sampling: Any) -> Iterator[list[FinishedResponse]]:
        answer = np.array([*b"Answer: 1/2"], np.int32)
        for i in range(len(requests)):
            yield [(i, Generation(answer, np.zeros(len(answer), np.float32), "stop", 0))]


@pytest.mark.usefixtures("codepoints")
def test_the_report_names_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text would say that 1/2 is not \\frac{1}{2}."""
    monkeypatch.setitem(judge.RULES, "math_verify", score_math_verify)  # here, not in a process that has to start
    monkeypatch.setattr(benchmark, "load_decode", lambda folder: lambda ids: bytes(ids.tolist()).decode())
    monkeypatch.setattr(benchmark, "_make_engine", lambda *_: HalfEngine())
    model = find_model(make_model(tmp_path / "model"))
    row = {"id": 1, "problem": "p", "answer": r"\frac{1}{2}"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    source = find_source("brumo_2025")
    result = read_source(source, tmp_path / "rows.jsonl")
    write_prepared(prepare(result, None)[0], tmp_path / "half.parquet")
    with Benchmark(model, {"half": tmp_path / "half.parquet"}, settings(), Progress()) as measured:
        summary = measured.measure("half", tmp_path)
    assert summary["metrics"]["avg@2"] == 1.0
    assert json.loads((tmp_path / "half.json").read_text())["settings"]["rule"] == "math_verify"


def texts_of(benchmark: Benchmark) -> dict[str, str]:
    """The first prompt of each set."""
    return {name: "".join(map(chr, prompts[0].token_ids)) for name, prompts in benchmark._sets.items()}


@pytest.mark.usefixtures("codepoints")
def test_a_run_puts_problems_as_it_was_trained_unless_asked(tmp_path: Path) -> None:
    run = find_model(make_run(tmp_path / "run", data={"template": "<{question}>"}, rollout={"max_response_tokens": 9}))
    model = find_model(make_model(tmp_path / "model"))
    files = {"bare": write_problems(tmp_path / "bare.jsonl"), "prepared": tmp_path / "prepared.parquet"}
    problem = Problem("x/1", (Message("user", "1 + 1?"),), "2", "x")
    write_prepared([problem], files["prepared"])
    default = ANSWER_TEMPLATE.replace("{question}", "1 + 1?") + "\n\n"
    own = Benchmark(run, files, settings(), Progress())
    assert texts_of(own) == dict.fromkeys(files, "<1 + 1?>\n\n")
    assert texts_of(Benchmark(model, files, settings(), Progress())) == dict.fromkeys(files, default)
    other = Benchmark(run, files, settings(template="Q: {question}"), Progress())
    assert texts_of(other) == dict.fromkeys(files, "Q: 1 + 1?\n\n")
    assert [b._describe_settings()["template"] for b in (own, other)] == ["<{question}>", "Q: {question}"]
    instructed = Problem("x/1", (Message("user", "How much is 1 + 1?"),), "2", "x", has_instruction=True)
    write_prepared([instructed], files["prepared"])
    assert texts_of(Benchmark(model, files, settings(), Progress()))["prepared"] == "How much is 1 + 1?\n\n"
    with pytest.raises(ValueError, match=r"--template: .*prepared.parquet has rows with an instruction of their own"):
        Benchmark(model, files, settings(template="Q: {question}"), Progress())


def test_the_form_of_prompts_can_be_asked_for() -> None:
    config = DataConfig(prompt="plain", template="<{question}>")
    assert data_config(config, settings()) == config
    assert data_config(config, settings(prompt="chat")) == DataConfig(prompt="chat", template="<{question}>")
    assert data_config(config, settings(template="{question}")) == DataConfig(prompt="plain", template="{question}")


class ReachedError(Exception):
    """The problems are read."""


@pytest.mark.usefixtures("codepoints")
def test_held_out_problems_are_found_without_the_training_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reach(*arguments: Any, **options: Any) -> None:
        raise ReachedError

    monkeypatch.setattr(benchmark, "HfEngine", reach)
    data = {"train": "gone.jsonl", "eval": {"mine": str(write_problems(tmp_path / "mine.jsonl"))}}
    run = make_run(tmp_path / "run", data=data)
    with pytest.raises(ReachedError):
        evaluate_held_out(run)
