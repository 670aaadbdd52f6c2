"""The scoring tool: order, forms of output, bad lines, and exit statuses."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import score

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: what else goes to standard error can then be told exactly."""
    monkeypatch.setattr(score, "QUIET_S", math.inf)


def write_rows(file: Path, rows: list[tuple[str, str]]) -> Path:
    file.write_text("".join(json.dumps({"response": text, "ground_truth": truth}) + "\n" for text, truth in rows))
    return file


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_come_out_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"Answer: {i}", "7" if i % 3 else str(i)) for i in range(200)]
    assert score.main(["--rule", "dapo", str(write_rows(tmp_path / "in.jsonl", rows))]) == 0
    captured = capsys.readouterr()
    is_right = [i % 3 == 0 or i == 7 for i in range(200)]
    assert read_lines(captured.out) == [
        {"score": 1.0 if right else -1.0, "acc": float(right), "pred": str(i)} for i, right in enumerate(is_right)
    ]
    assert captured.err == ""


def test_equal_mathematics_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("Answer: 68/2", "34"), ("Answer: \ud800", "34"), ("34", "34")]
    out = tmp_path / "out.jsonl"
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert score.main(["--rule", "math_verify", "--workers", "1", str(source), "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert read_lines(out.read_text()) == [
        {"score": 1.0, "acc": 1.0, "pred": "68/2"},
        {"score": -1.0, "acc": 0.0, "pred": "\ud800"},
        {"score": -1.0, "acc": 0.0, "pred": "[INVALID]"},
    ]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"response": "x"', "is not JSON"),
        (b'{"response": "\xff", "ground_truth": "1"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "must be an object with the text response and the text or number ground_truth"),
        (b'{"response": "x"}', "must be an object with the text response and the text or number ground_truth"),
        (b'{"response": 34, "ground_truth": "34"}', "must be an object with the text response"),
        (b'{"response": "x", "ground_truth": true}', "must be an object with the text response"),
        (b'{"response": "x", "ground_truth": NaN}', "must be an object with the text response"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, cause: str) -> None:
    good = b'{"response": "Answer: 1", "ground_truth": "1"}'
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\n".join([good, good, line, good]))
    assert score.main(["--rule", "dapo", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"line 3 of {file}" in captured.err
    assert cause in captured.err


def test_unusable_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "in.jsonl", [("Answer: 1", "1")])
    assert score.main(["--rule", "dapo", str(tmp_path / "none.jsonl")]) == 2
    assert score.main(["--rule", "math_verify", "--workers", "0", str(file)]) == 2
    assert score.main(["--rule", "dapo", str(file), "--out", str(tmp_path / "no" / "out.jsonl")]) == 2
    messages = capsys.readouterr().err.splitlines()
    assert [message.rpartition(": ")[2] for message in messages] == [
        "No such file or directory",
        "must be at least 1",
        "No such file or directory",
    ]


def test_a_line_that_cannot_be_judged_harms_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("Answer: 1", "1"), ("Answer: 1", "@@#"), ("Answer: 2", "1")]
    file = write_rows(tmp_path / "in.jsonl", rows)
    assert score.main(["--rule", "math_verify", "--workers", "1", str(file)]) == 1
    captured = capsys.readouterr()
    first, second, third = read_lines(captured.out)
    assert (first, third["score"]) == ({"score": 1.0, "acc": 1.0, "pred": "1"}, -1.0)
    assert f"line 2 of {file}: ValueError: the ground truth '@@#'" in second.pop("error")
    assert second == {"score": None, "acc": 0.0, "pred": "[UNJUDGED]"}
    assert captured.err == "score: 1 of 3 could not be judged: see their `error`\n"


def test_numbers_are_ground_truths_and_blank_lines_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "in.jsonl"
    rows = [{"response": f"Answer: {text}", "ground_truth": truth} for text, truth in (("42", 42), ("0.5", 0.5))]
    file.write_text("\n".join([json.dumps(rows[0]), " ", json.dumps(rows[1]), "", ""]))
    assert score.main(["--rule", "dapo", str(file)]) == 0
    assert [line["acc"] for line in read_lines(capsys.readouterr().out)] == [1.0, 1.0]
    with file.open("a") as rest:
        rest.write("{")
    assert score.main(["--rule", "dapo", str(file)]) == 2
    assert f"line 5 of {file} is not JSON" in capsys.readouterr().err


def test_progress_is_shown_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "QUIET_S", -1.0)
    file = write_rows(tmp_path / "in.jsonl", [("Answer: 1", "1")] * 100)
    assert score.main(["--rule", "dapo", str(file)]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["64 of 100 scored", "100 of 100 scored"]
    assert len(captured.out.splitlines()) == 100


def test_help_is_quick_and_has_examples() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "tools/score.py", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # of processor time
    assert "tools/score.py --rule math_verify" in text
