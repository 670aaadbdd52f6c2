"""DAPO's rule: the last `Answer:` line, normalised, must equal the normalised ground truth as a string.

The normalisation is that of Minerva (arXiv 2206.14858, appendix D.1) in the form that DAPO (arXiv 2503.14476) trains
with. Results of other recipes are comparable only if it is reproduced to the letter, oddities included: steps run in
this order, and a word is cut out wherever its letters occur.
"""

from __future__ import annotations

import re

from fipo_megatron.reward.base import NO_ANSWER, Verdict

MAX_READ_CHARS = 300  # an answer stands at the end; what comes before is not read
ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples"),
    r"\text{s}",
    r"\text{.}",
    "\\text{\ns}",
    r"\text{}^2",
    r"\text{}^3",
    "\\text{\n}",
    r"\text{}",
    r"\mathrm{th}",
    r"^\circ",
    r"^{\circ}",
    r"\;",
    r",\!",
    "{,}",
    '"',
    r"\dots",
)
REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r".*?\$(.*?)\$.*", r"$\1$"),  # of a line with $...$ only the first such part
        (r"\\text\{(.*?)\}", r"\1"),
        (r"\\textbf\{(.*?)\}", r"\1"),
        (r"\\overline\{(.*?)\}", r"\1"),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"frac([^{])(.)", r"frac{\1}{\2}"),  # \frac12 -> \frac{1}{2}
        (r"sqrt([^{])", r"sqrt{\1}"),  # \sqrt2 -> \sqrt{2}
    )
)


def normalize_answer(answer: str) -> str:
    """The answer in the form in which DAPO's rule compares two of them."""
    answer = answer.split("=")[-1]
    for old, new in REPLACED:
        answer = answer.replace(old, new)
    for expression in REMOVED:
        answer = answer.replace(expression, "")
    for pattern, replacement in REWRITTEN:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    without_commas = answer.replace(",", "")
    return without_commas if without_commas.isdigit() else answer.strip()


def score_dapo(response: str, ground_truth: str) -> Verdict:
    """+1 for the right answer, else -1; a response without an `Answer:` line predicts `[INVALID]`.

    Raises:
        ValueError: the normalisation leaves nothing of the ground truth, or makes it `[INVALID]`: a response that says
            nothing would be right.
    """
    expected = normalize_answer(ground_truth)
    if expected in ("", NO_ANSWER):
        raise ValueError(
            f"the ground truth {ground_truth!r} is {expected!r} to DAPO's rule; correct it or use "
            "reward.rule=math_verify"
        )
    answers = ANSWER_LINE.findall(response[-MAX_READ_CHARS:])
    prediction = normalize_answer(answers[-1] if answers else NO_ANSWER)
    is_right = prediction == expected
    return Verdict(score=1.0 if is_right else -1.0, accuracy=float(is_right), prediction=prediction)
