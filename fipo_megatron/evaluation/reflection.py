"""Share of responses that verify, re-derive or correct themselves, counted by phrases.

A rule, not a judge: it sees that a response says so, not that the check was sound. Phrases are English, match whole
words in any case, and are chosen to leave out the same words in the text of a problem ("write a check", "wait for the
bus", "how many different ways"). Rates are comparable only between texts counted by the same version of these lists.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Where a remark begins: at the start of a line, sentence or clause, after a few fillers. Repetitions have limits:
# without them a response of nothing but line ends or fillers would take time that grows with the square of its length.
CLAUSE_START = (
    r"(?:^|[.,;:!?\u2026()\n\u2013\u2014-])\s{0,3}"
    r"(?:(?:but|oh|ah|hm{1,5}|no|so|and|ok|okay|well)\b[,.\u2026]{0,3}\s{0,3}){0,3}"
)
WE = r"(?:let me|let us|let's|lemme|(?:i|we)(?:'ll| will| can| could| should| must| need to| want to)?)"
WORK = r"(?:work|answers?|results?|solutions?|calculations?|steps?|reasoning|arithmetic)"

VERIFICATION = (
    r"\bverif(?:y|ies|ied|ying|ication)\b",
    r"\b(?:double|cross|sanity|self)[- ]?check(?:s|ed|ing)?\b",
    r"\bre-?check(?:s|ed|ing)?\b",
    rf"\b{WE} (?:quickly |also |now |just )?check\b",
    rf"\bcheck(?:ing)? (?:my|our|the|this) {WORK}\b",
    r"\bcheck\s*:",
    r"\b(?:plug|substitut)(?:e|ging|ing)? (?:\S+ ){0,4}back\b",
)
REDERIVATION = (
    rf"{CLAUSE_START}alternatively\b",
    r"\banother (?:way|approach|method)\b",
    r"\bdifferent (?:approach|method)\b",
    r"\bin a different way\b",
    r"\bre-?(?:deriv|calculat|comput)(?:e|es|ed|ing|ation)\b",
    r"\bre-?do(?:ing)?\b",
    r"\b(?:start|begin|starting) (?:over|again|from scratch)\b",
    r"\b(?:solve|compute|calculate|derive) (?:it|this|that) again\b",
)
CORRECTION = (
    rf"{CLAUSE_START}wait\b(?! (?:for|until|till|times?|lists?|at|in|\d))",
    rf"{CLAUSE_START}actually\b",
    r"\bhold on\b(?! to\b)",
    r"\bscratch that\b",
    r"\bmy (?:mistake|bad)\b",
    r"\b(?:i|we) (?:made|have made|had made) (?:a|an) (?:\w+ )?(?:mistake|error)\b",
    r"\b(?:i|we) (?:was|were) (?:wrong|mistaken)\b",
    r"\bthat(?:'s| is| was) (?:wrong|incorrect|not right|a mistake)\b",
    rf"\b{WE} (?:correct|fix|reconsider|rethink|re-?examine|revisit)\b",
)


def _compile(phrases: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(phrases), re.IGNORECASE | re.MULTILINE)


VERIFICATION_PATTERN, REDERIVATION_PATTERN, CORRECTION_PATTERN = map(_compile, (VERIFICATION, REDERIVATION, CORRECTION))


@dataclass(frozen=True)
class Reflection:
    """What one response does."""

    verifies: bool  # checks a result
    rederives: bool  # reaches a result again, or in another way
    corrects: bool  # interrupts or takes back what it said


def find_reflection(response: str) -> Reflection:
    """What the response's phrases say it does."""
    text = response.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return Reflection(
        verifies=VERIFICATION_PATTERN.search(text) is not None,
        rederives=REDERIVATION_PATTERN.search(text) is not None,
        corrects=CORRECTION_PATTERN.search(text) is not None,
    )


def reflection_rates(reflections: Sequence[Reflection]) -> dict[str, float]:
    """`verifies_frac`, `rederives_frac`, `corrects_frac` and `reflects_frac` (any of the three) of all responses.

    A response counts once however often it does so. No responses is a ValueError.
    """
    if not reflections:
        raise ValueError("reflections: there are none; a rate needs one response or more")
    flags = {
        "verifies_frac": [reflection.verifies for reflection in reflections],
        "rederives_frac": [reflection.rederives for reflection in reflections],
        "corrects_frac": [reflection.corrects for reflection in reflections],
        "reflects_frac": [reflection != Reflection(False, False, False) for reflection in reflections],
    }
    return {name: sum(values) / len(reflections) for name, values in flags.items()}
