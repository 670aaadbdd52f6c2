"""Options of the evaluating tool: what is refused, with one line and exit status 2, and what stands for the rest."""

from pathlib import Path

import pytest

from fipo_megatron.trainer.benchmark import BenchmarkSettings
from tools import evaluate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is no run folder"),
        (["--k", "4"], "--k: has no effect without --sets"),
        (["--max-response-tokens", "4"], "--max-response-tokens: has no effect without --sets"),
        (["--sets", "aime_2042"], "set 'aime_2042': unknown; known: aime_2024, "),
        (["--sets", "x=missing.jsonl"], "no file missing.jsonl"),
        (["--sets", "aime_2024"], "make it with tools/prepare_data.py aime_2024"),
        (["--sets", "x=x.jsonl"], "neither a run folder (config.yaml) nor a Hugging Face folder (config.json)"),
        (["--sets", "x=x.jsonl", "--k", "0"], "--k 0: must be at least 1"),
        (["--sets", "x=x.jsonl", "--num-problems", "-1"], "--num-problems -1: must be at least 1"),
        (["--sets", "x=x.jsonl", "--greedy", "--k", "4"], "--greedy: takes no --k"),
        (["--sets", "x=x.jsonl", "--temperature", "0"], "--temperature 0: must be above 0"),
        (["--sets", "x=x.jsonl", "--temperature", "nan"], "--temperature nan: must be above 0"),
        (["--sets", "x=x.jsonl", "--top-p", "1.5"], "--top-p 1.5: must be above 0 and at most 1"),
        (["--sets", "x=x.jsonl", "--seed", "-1"], "--seed -1: must be at least 0"),
        (["--prompt", "chat"], "--prompt: has no effect without --sets"),
        (["--template", "{question}"], "--template: has no effect without --sets"),
        (["--sets", "x=x.jsonl", "--template", "none.txt"], "--template none.txt: neither a text with {question} nor "),
        (["--sets", "x=x.jsonl", "--template", "x.jsonl"], "--template x.jsonl: must hold {question} once, holds it 0"),
        (["--sets", "x=x.jsonl", "--template", "{question}{question}"], "once, holds it 2 times"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").touch()
    assert evaluate.main(["folder", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_papers_settings_are_the_default() -> None:
    settings = evaluate.make_settings(evaluate.make_parser().parse_args(["model", "--sets", "aime_2024"]))
    assert settings == BenchmarkSettings(32, temperature=1.0, top_p=0.7, engine="vllm", seed=0)
    greedy = evaluate.make_settings(evaluate.make_parser().parse_args(["model", "--sets", "aime_2024", "--greedy"]))
    assert greedy == BenchmarkSettings(1, temperature=0.0, top_p=1.0, engine="vllm", seed=0)


def test_prompt_and_template_are_given_as_text_or_by_file(tmp_path: Path) -> None:
    def asked(*arguments: str) -> tuple[str | None, str | None]:
        options = evaluate.make_parser().parse_args(["model", "--sets", "aime_2024", *arguments])
        settings = evaluate.make_settings(options)
        return settings.prompt, settings.template

    (tmp_path / "template.txt").write_text("Q: {question}\n\nA:\n")
    assert asked() == (None, None)
    assert asked("--prompt", "plain") == ("plain", None)
    assert asked("--template", "Q: {question}") == (None, "Q: {question}")
    assert asked("--template", str(tmp_path / "template.txt")) == (None, "Q: {question}\n\nA:")
