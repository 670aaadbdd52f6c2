"""A custom function is checked without being run, and its result is read strictly."""

from pathlib import Path

import pytest

from fipo_megatron.reward.base import Verdict
from fipo_megatron.reward.custom_function import as_verdict, check_function

SOURCE = """
raise SystemExit("executed")

def reward(response, ground_truth): return 1.0
def typed(response: str, ground_truth: str, /, scale: float = 1.0, *, log: bool = False) -> float: return 1.0
def variadic(*arguments): return 1.0
def one(response): return 1.0
def three(response, ground_truth, prompt): return 1.0
def keyword(response, ground_truth, *, scale): return 1.0
class Scorer:
    def method(self, response, ground_truth): return 1.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "rewards.py"
    file.write_text(SOURCE)
    return file


@pytest.mark.parametrize("name", ["reward", "typed", "variadic"])
def test_a_function_of_two_arguments_passes_unexecuted(file: Path, name: str) -> None:
    check_function(f"{file}:{name}")


@pytest.mark.parametrize("name", ["one", "three", "keyword"])
def test_other_arguments_are_refused(file: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"rewards.py:{name}': must be callable as {name}\(response, ground_truth\)"):
        check_function(f"{file}:{name}")


@pytest.mark.parametrize("name", ["rewards", "method", "Scorer"])
def test_a_missing_function_is_refused_with_those_that_exist(file: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"rewards.py defines no function {name}; it defines keyword, one, reward, "):
        check_function(f"{file}:{name}")


@pytest.mark.parametrize("function", ["rewards.py", "rewards:reward", "rewards.py:", "rewards.py:1st", ""])
def test_another_form_is_refused(function: str) -> None:
    with pytest.raises(ValueError, match=r"reward.function: .* is not of the form path/to/file.py:function_name"):
        check_function(function)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*none.py: No such file"):
        check_function(f"{tmp_path}/none.py:reward")


@pytest.mark.parametrize("content", [b"def reward(:", b"\x00", b"\xff"])
def test_a_file_that_is_not_python_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.py").write_bytes(content)
    with pytest.raises(ValueError, match=r"text.py is not Python"):
        check_function(f"{tmp_path}/text.py:reward")


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (0.25, Verdict(0.25, 1.0, "")),
        (0, Verdict(0.0, 0.0, "")),
        (-1, Verdict(-1.0, 0.0, "")),
        ({"score": -0.5, "accuracy": 1, "prediction": "34"}, Verdict(-0.5, 1.0, "34")),
        (Verdict(1.0, 1.0, "34"), Verdict(1.0, 1.0, "34")),
    ],
)
def test_results(result: object, verdict: Verdict) -> None:
    assert as_verdict(result) == verdict


@pytest.mark.parametrize(
    ("result", "named"),
    [
        (float("nan"), "returned nan"),
        (float("-inf"), "returned -inf"),
        (None, "returned None"),
        ("1.0", "returned '1.0'"),
        ([1.0], r"returned \[1.0\]"),
        ({"score": 1.0}, r"returned {'score': 1.0}; the keys must be"),
        ({"score": 1.0, "accuracy": 1.0, "prediction": "", "acc": 1.0}, "the keys must be"),
        ({"score": None, "accuracy": 1.0, "prediction": ""}, "score None"),
        ({"score": 1.0, "accuracy": float("nan"), "prediction": ""}, "accuracy nan"),
        ({"score": 1.0, "accuracy": 0.5, "prediction": ""}, "accuracy 0.5; it must be 0 or 1"),
        ({"score": 1.0, "accuracy": 1.0, "prediction": 34}, "prediction 34; it must be text"),
        (Verdict(float("inf"), 1.0, ""), "score inf"),
    ],
)
def test_other_results_are_shown(result: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        as_verdict(result)
