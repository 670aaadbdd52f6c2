"""How the training tool ends: exit status, the cause, and where everything is that the run has left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fipo_megatron.observability.trackers import WANDB_URL
from fipo_megatron.trainer import launch
from tools import train

pytestmark = pytest.mark.usefixtures("own_signals")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the run goes, in a working directory of its own; nothing is checked or planned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "check_before_start", lambda config, is_resumed: None)
    monkeypatch.setattr(launch, "plan_training", lambda config, files, scratch, progress, checkpoint: None)
    return tmp_path / "runs" / "test"


def start(monkeypatch: pytest.MonkeyPatch, ending: BaseException | None, *overrides: str) -> int:
    """The exit status of a run that leaves what two of its steps leave, and ends so."""

    async def run_training(plan: None, folder: Path, progress: object, stop: object) -> int:
        lines = [{"step": 0, "eval/sampled_accuracy": 0.25}, {"step": 1}, {"step": 2, "eval/sampled_accuracy": 0.75}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "curves.png").touch()
        (folder / "samples").mkdir()
        (folder / "evaluation").mkdir()
        (folder / "tensorboard").mkdir()
        (folder / WANDB_URL).write_text("https://wandb.example/fipo/1\n")
        (folder / "wandb" / "offline-run-7").mkdir(parents=True)
        if ending is not None:
            raise ending
        (folder / "hf").mkdir()
        return 500

    monkeypatch.setattr(launch, "run_training", run_training)
    Path("small.yaml").write_text("warm_start: {}\n")
    return train.main(["small.yaml", "run.name=test", *overrides])


LEFT = (
    "run folder: runs/test",
    "config: runs/test/config.yaml",
    "curves: runs/test/curves.png",
    "held-out problems, one by one: runs/test/evaluation",
    "metrics: runs/test/metrics.jsonl, to step 2",
    "view_samples.py runs/test",
    "-m tensorboard.main --logdir runs",
    "wandb: https://wandb.example/fipo/1",
    "wandb, not sent yet: wandb sync runs/test/wandb/offline-run-7",
    "compare_runs.py runs/test OTHER_RUN ...",
)


def check_left(printed: str, *more: str) -> None:
    lines = printed.splitlines()
    for text in (*LEFT, *more):
        assert [line for line in lines if line.endswith(text)], text


def test_a_run_that_completes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, None) == 0
    printed = capsys.readouterr()
    assert "0.250" in printed.out
    assert "0.750" in printed.out
    check_left(printed.out, "policy: runs/test/hf")
    assert printed.err == ""
    assert not (folder / "error.log").exists()


def test_a_run_that_is_interrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, KeyboardInterrupt()) == 130
    printed = capsys.readouterr().err
    check_left(printed, "policy: none, a run that completes writes hf/")
    assert printed.splitlines()[-1] == "interrupted; all worker processes have ended"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_failure_in_the_run_is_no_refusal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    error = kind("no such shape")
    error.add_note("rank 1 says so")
    assert start(monkeypatch, error) == 1
    printed = capsys.readouterr().err
    check_left(printed, "policy: none, a run that completes writes hf/", "traceback: runs/test/error.log")
    assert printed.splitlines()[-1] == f"error: {kind.__name__}: no such shape rank 1 says so"
    assert "in run_training" in (folder / "error.log").read_text()


@pytest.mark.parametrize("refusing", ["check_before_start", "plan_training"])
def test_what_is_refused_before_a_process_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refusing: str
) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise ValueError("data.prompt = 'chat': there is no template")

    monkeypatch.setattr(launch, refusing, refuse)
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert start(monkeypatch, None, "run.overwrite=true") == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1] == "error: data.prompt = 'chat': there is no template"
    assert (folder / "config.yaml").exists()  # of the run that it would have replaced
    assert "metrics: " not in printed


def test_a_failure_before_there_is_a_folder_shows_where(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("the tokenizer is broken")

    monkeypatch.setattr(launch, "plan_training", fail)
    assert start(monkeypatch, None) == 1
    printed = capsys.readouterr().err
    assert "in fail\n" in printed
    assert printed.splitlines()[-1] == "error: RuntimeError: the tokenizer is broken"
    assert not folder.exists()


def test_an_interrupt_before_there_is_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: object, is_resumed: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "check_before_start", interrupt)
    assert start(monkeypatch, None) == 130
    assert capsys.readouterr().err == "interrupted; all worker processes have ended\n"
    assert not folder.exists()
