"""tools/view_samples.py: which steps it shows, what it writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fipo_megatron.config.load import save_config
from fipo_megatron.config.schema import Config
from fipo_megatron.observability.sample_viewer import TokenTexts
from fipo_megatron.observability.samples import TokenRecord, samples_path, write_samples
from fipo_megatron.types import Prompt, Sample, SampleGroup

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("view_samples", ROOT / "tools/view_samples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three recorded steps, one group each, whose tokens are the digits."""
    folder = tmp_path / "my_run"
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "config.json").touch()
    save_config(
        Config.model_validate({"model": {"path": "gone"}, "algorithm": {"preset": "fipo_7b"}}), folder / "config.yaml"
    )
    metrics = {"step": 2, "rollout/accuracy": 0.25, "rollout/recorded_groups": 8, "rollout/trained_groups": 32}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    ids = np.array([3, 4], np.int32)
    for step in (1, 2, 3):
        prompt = Prompt(f"train/{step}", (1, 2), "34", "arithmetic")
        sample = Sample(prompt, ids, np.array([-0.1, -0.2], np.float32), 0, "stop", "34", 1.0, 1.0, "34")
        record = TokenRecord(np.ones(1), *(np.array([-0.1, -0.2], np.float32) for _ in range(3)))
        write_samples(samples_path(folder, step), [SampleGroup(prompt, (sample,))], record, lambda ids: str(list(ids)))
    texts = TokenTexts(str, str, frozenset())
    monkeypatch.setattr("fipo_megatron.observability.sample_viewer.load_token_texts", lambda folder: texts)
    return folder


def call(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["view_samples.py", *arguments])
    return int(tool.main())


@pytest.mark.parametrize(
    ("recorded", "asked", "chosen"),
    [
        ([7], None, [7]),
        ([1, 2, 3], None, [1, 2, 3]),
        (list(range(1, 41)), None, [1, 9, 17, 24, 32, 40]),
        ([1, 2, 3], [3, 1, 3], [1, 3]),
    ],
)
def test_chosen_steps(tool: ModuleType, recorded: list[int], asked: list[int] | None, chosen: list[int]) -> None:
    assert tool.choose_steps(recorded, asked) == chosen


def test_a_page_is_written_into_the_run(
    tool: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tool, monkeypatch, str(run), "--step", "2") == 0
    page = (run / "samples.html").read_text()
    start = page.index('id="data">') + len('id="data">')
    data = json.loads(page[start : page.index("</script>", start)])
    assert (data["run"], data["algorithm"]) == ("my_run", "fipo_7b")
    assert [(step["step"], step["summary"]) for step in data["steps"]] == [
        (2, "accuracy 0.250  written 8 of 32 groups")
    ]
    assert data["tokens"] == {"3": "3", "4": "4"}
    assert capsys.readouterr().out.startswith(f"{run / 'samples.html'}: steps 2; ")
    assert call(tool, monkeypatch, str(run), "--out", str(run / "all.html")) == 0
    assert "steps 1, 2, 3; " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "9"], "--step 9: not recorded; the run has samples of steps 1 to 3"),
        (["--groups", "0"], "--groups 0: must be at least 1"),
    ],
)
def test_refusals_are_one_line(
    tool: ModuleType,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert call(tool, monkeypatch, str(run), *arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_folder_without_samples_or_tokenizer_is_named(
    tool: ModuleType, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tool, monkeypatch, str(tmp_path)) == 2
    assert "no samples; give the folder of a run" in capsys.readouterr().err
    (run / "hf" / "config.json").unlink()
    assert call(tool, monkeypatch, str(run)) == 2
    assert f"no tokenizer in {run / 'hf'} or {Path('gone').resolve()}" in capsys.readouterr().err
