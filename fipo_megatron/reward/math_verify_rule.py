"""The symbolic rule: by the math-verify library, the last answer must be the same mathematics as the ground truth.

Imported in worker processes alone (sandbox.py): a short expression can take for ever or all memory. Answers go through
the library's LaTeX grammar only. Its reader of plain expressions is left out: it evaluates what it has read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy  # type: ignore[import-untyped]
from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]
from sympy.parsing import sympy_parser  # type: ignore[import-untyped]

from fipo_megatron.reward.base import NO_ANSWER, Verdict
from fipo_megatron.reward.math_answer import ANSWER_LINE

MAX_READ_CHARS = 2000  # an answer stands at the end; matrices are longer than the numbers of DAPO's rule
BOXED = r"\boxed{"
DELIMITED = re.compile(r"\$.+\$|\\\(.+\\\)|\\\[.+\\\]|\\boxed\{", re.DOTALL)
NUMBER_CODE = re.compile(r"(Integer|Float)\s*\(\s*'?([\d.eE+-]+)'?\s*\)")

# It would warn that its own time limit is off: the sandbox has one.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def score_math_verify(response: str, ground_truth: str) -> Verdict:
    """+1 for the right answer, else -1; the prediction is the answer as written, `[INVALID]` where there is none.

    Raises:
        ValueError: the ground truth cannot be read as mathematics.
    """
    expected = _parse(ground_truth)
    if not expected:
        raise ValueError(
            f"the ground truth {ground_truth!r} cannot be read as LaTeX; correct it or use reward.rule=dapo"
        )
    answer = extract_answer(response)
    if answer is None:
        return Verdict(score=-1.0, accuracy=0.0, prediction=NO_ANSWER)
    is_right = verify(expected, _parse(answer), timeout_seconds=None)
    return Verdict(score=1.0 if is_right else -1.0, accuracy=float(is_right), prediction=answer)


def extract_answer(response: str) -> str | None:
    r"""What follows the last `Answer:` on its line, or the content of the last `\boxed{}` if that begins later."""
    end = response[-MAX_READ_CHARS:]
    lines = list(ANSWER_LINE.finditer(end))
    start = end.rfind(BOXED)
    if lines and lines[-1].end() > start:
        return str(lines[-1][1]).strip(" *")  # bold in Markdown
    if start < 0:
        return None
    content = start + len(BOXED)
    depth = 1
    for position in range(content, len(end)):
        depth += {"{": 1, "}": -1}.get(end[position], 0)
        if depth == 0:
            return end[content:position].strip()
    return None


def _parse(answer: str) -> list[Any]:
    """Zero or one expression."""
    answer = answer.replace(r"\$", "")  # money
    if not DELIMITED.search(answer):
        answer = f"${answer.replace('$', '').rstrip('. ')}$"
    with _evaluating_numbers_alone():
        parsed: list[Any] = parse(answer, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return parsed


@contextmanager
def _evaluating_numbers_alone() -> Iterator[None]:
    """Nothing but numbers passes SymPy's `eval` of the code that it makes of text, and without being evaluated.

    The grammar hands it digits alone; this keeps it so. Elsewhere SymPy evaluates text of its own.
    """
    evaluate = sympy_parser.eval_expr
    sympy_parser.eval_expr = _make_number
    try:
        yield
    finally:
        sympy_parser.eval_expr = evaluate


def _make_number(code: str, *scopes: Any) -> sympy.Number:
    """The number that SymPy's generated `code` stands for; a ValueError for any other code."""
    number = NUMBER_CODE.fullmatch(code.strip())
    if number is None:
        raise ValueError(f"text of a response must not be evaluated: {code[:100]!r}")
    return {"Integer": sympy.Integer, "Float": sympy.Float}[number[1]](number[2])


# Much of SymPy is imported by its first use: here, else the first response would pay for it from its time limit.
score_math_verify("Answer: $(x+1)^2$", "x^2+2x+1")
