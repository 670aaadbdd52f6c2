"""The tool that turns a verl launcher into a configuration: what it prints and writes, and its exit statuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from fipo_megatron.config.load import load_config
from tools import import_verl_config

LAUNCHER = Path(__file__).parents[1] / "data" / "verl_launcher.txt"


def test_a_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    assert import_verl_config.main([str(LAUNCHER), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for title in ("taken over:", "verl's default:", "same as the default:", "no counterpart:", "unknown: 1"):
        assert title in printed
    assert "to do: data.train: the launcher doesn't assign HOME; write the path itself" in printed
    assert "to do: --config-name=dapo_megatron_trainer.yaml: that file is not read" in printed
    assert "to do: parallel" not in printed
    assert printed.endswith(f"written: {out}\n")
    assert load_config(out).parallel.world_size == 16


def test_what_is_left_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "overrides.txt"
    path.write_text("algorithm.adv_estimator=grpo\nactor_rollout_ref.rollout.n=8\n")
    assert import_verl_config.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "to do: model.path = None: no policy" in printed
    assert "to do: parallel: the launcher has no layout of Megatron's" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "launcher.sh: no such file; correct the path"),
        ("\udcff", "launcher.sh: is no text in UTF-8 (invalid start byte at byte 0)"),
        ("algorithm.adv_estimator=gae", "algorithm.adv_estimator = 'gae': has no counterpart"),
    ],
)
def test_refusals(text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "launcher.sh", tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    assert import_verl_config.main([str(path), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("seed: 3\n")
    assert import_verl_config.main([str(LAUNCHER), "--out", str(out)]) == 2
    assert "exists; give another name" in capsys.readouterr().err
    assert out.read_text() == "seed: 3\n"


def test_a_folder_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_verl_config.main([str(LAUNCHER), "--out", str(tmp_path / "none/mine.yaml")]) == 2
    assert f"no folder {tmp_path / 'none'}; make it" in capsys.readouterr().err
