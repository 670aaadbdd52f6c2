"""The interface between a rule and whoever asks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# Predictions of a response without an answer that can be judged.
NO_ANSWER = "[INVALID]"  # it has no answer line
TIMED_OUT = "[TIMEOUT]"  # judging it took more than reward.timeout_s
CRASHED = "[CRASHED]"  # judging it ended the process, e.g. by deep recursion or beyond reward.memory_gib
UNJUDGED = "[UNJUDGED]"  # the rule failed on it: it raised, or returned no verdict


@dataclass(frozen=True)
class Verdict:
    """What a rule says about one response, before penalties."""

    score: float
    accuracy: float  # 1.0 if the answer is right, else 0.0
    prediction: str  # the answer that the rule extracted


class RewardFunction(Protocol):
    """A rule. It reads text written by a model: it must never evaluate or execute any of it."""

    def __call__(self, response: str, ground_truth: str) -> Verdict: ...
