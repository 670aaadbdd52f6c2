"""The conversion tool: there and back, what it says, and exit statuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.unit.checkpoint.test_conversion import same_bits, write_folder
from tools import convert


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_folder("qwen3_moe", tmp_path / "model")
    there, back = tmp_path / "megatron", tmp_path / "hf"
    assert run("hf-to-megatron", "--model", model, "--out", there, "--tp", 2, "--ep", 2, "--pp", 2, "--check") == 0
    assert run("megatron-to-hf", "--model", there, "--out", back, "--check", "--jobs", 1) == 0
    output = capsys.readouterr()
    number = len(load_file(model / "model.safetensors"))
    assert re.findall(r"equal: (\d+) tensors", output.out) == [str(number)] * 2
    assert [match.groups() for match in re.finditer(r"(\w+), MiB: (\d+) of (\d+) in", output.err)] == [
        ("convert", "1", "1"), ("check", "1", "1"),
    ] * 2  # fmt: skip
    assert same_bits(load_file(back / "model.safetensors"), load_file(model / "model.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--model", "model", "--jobs", "0"], "--jobs = 0: must be at least 1"),
        (["--model", "model", "--tp", "3"], "tp = 3 does not divide the model's num_key_value_heads"),
    ],
)
def test_refusals(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder("qwen2", tmp_path / "model")
    assert run("hf-to-megatron", *arguments, "--out", "out") == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_foreign_checkpoint_needs_its_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_folder("qwen2", tmp_path / "model")
    there = tmp_path / "megatron"
    assert run("hf-to-megatron", "--model", model, "--out", there) == 0
    (there / "manifest.json").unlink()
    assert run("megatron-to-hf", "--model", there, "--out", tmp_path / "hf") == 1
    assert "add --allow-foreign" in capsys.readouterr().err
    assert run("megatron-to-hf", "--model", there, "--out", tmp_path / "hf", "--allow-foreign") == 0
