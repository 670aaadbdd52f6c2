"""A user's reward function: `reward.function: path/to/file.py:name`, called as name(response, ground_truth).

It returns a score, which counts as right if above 0, or all three parts of a verdict: {"score": 1.0, "accuracy": 1.0,
"prediction": "34"}.
"""

from __future__ import annotations

import ast
import math
from numbers import Real
from pathlib import Path
from typing import Any

from fipo_megatron.reward.base import Verdict

NUM_PARAMETERS = 2  # response, ground_truth
KEYS = ("score", "accuracy", "prediction")


def check_function(function: str) -> None:
    """Raises a ValueError unless `path/to/file.py:name` names a function of two arguments; nothing is executed."""
    where = f"reward.function: {function!r}"
    path, _, name = function.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{where} is not of the form path/to/file.py:function_name")
    try:
        tree = ast.parse(Path(path).read_bytes(), filename=path)
    except OSError as error:
        raise ValueError(f"{where}: cannot read {path}: {error.strerror}; correct the path") from error
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: {path} is not Python: {error}; correct the file") from error
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        raise ValueError(
            f"{where}: {path} defines no function {name}; it defines {', '.join(sorted(functions)) or 'none'}"
        )
    arguments = functions[name].args
    positional = [*arguments.posonlyargs, *arguments.args]
    num_required = len(positional) - len(arguments.defaults)
    takes_two = num_required <= NUM_PARAMETERS and (len(positional) >= NUM_PARAMETERS or arguments.vararg is not None)
    if not takes_two or None in arguments.kw_defaults:
        raise ValueError(
            f"{where}: must be callable as {name}(response, ground_truth); it is def {name}(...) otherwise"
        )


def as_verdict(result: Any) -> Verdict:
    """The verdict that a function's result stands for; a ValueError that shows the result if it is none."""
    if isinstance(result, Verdict):
        result = vars(result)
    if _is_finite(result):
        return Verdict(score=float(result), accuracy=float(result > 0), prediction="")
    if not isinstance(result, dict):
        raise ValueError(f"it returned {result!r:.200}; return a finite number, or a dict of {', '.join(KEYS)}")
    if set(result) != set(KEYS):
        raise ValueError(f"it returned {result!r:.200}; the keys must be {', '.join(KEYS)}")
    for key in ("score", "accuracy"):
        if not _is_finite(result[key]):
            raise ValueError(f"it returned {key} {result[key]!r:.200}; it must be a finite number")
    if result["accuracy"] not in (0, 1):
        raise ValueError(f"it returned accuracy {result['accuracy']!r}; it must be 0 or 1; grade by the score")
    if not isinstance(result["prediction"], str):
        raise ValueError(f"it returned prediction {result['prediction']!r:.200}; it must be text")
    return Verdict(float(result["score"]), float(result["accuracy"]), result["prediction"])


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False
