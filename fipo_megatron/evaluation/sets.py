"""The problem sets of the paper by name: where their files lie, and what was published on them.

Sources: arXiv 2603.19835, tables of Qwen2.5-32B and Qwen2.5-Math-7B (AIME 2024 and 2025); the other rows, and second
figures of AIME, are from the paper's page of benchmark results, which does not name the base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DATA_FOLDER = Path("data")  # where tools/prepare_data.py writes by default
QWEN_32B, QWEN_MATH_7B = "Qwen2.5-32B", "Qwen2.5-Math-7B"


@dataclass(frozen=True)
class Published:
    """Accuracies as shares, by 32 samples a problem; None where none was published."""

    algorithm: str
    base_model: str | None  # None: the source does not say
    avg_at_32: float
    cons_at_32: float | None = None
    pass_at_32: float | None = None

    @property
    def label(self) -> str:
        """Whose figures these are, in few words."""
        size = "other" if self.base_model is None else self.base_model.rpartition("-")[2]
        return f"{self.algorithm} {size}"


@dataclass(frozen=True)
class EvaluationSet:
    """Problems that accuracy is measured on."""

    name: str
    published: tuple[Published, ...] = ()  # the figure to compare with first

    @property
    def path(self) -> Path:
        """Where tools/prepare_data.py puts it."""
        return DATA_FOLDER / f"{self.name}.parquet"


SETS: Mapping[str, EvaluationSet] = {
    evaluation_set.name: evaluation_set
    for evaluation_set in (
        EvaluationSet(
            "aime_2024",
            (
                Published("FIPO", QWEN_32B, 0.56, 0.73, 0.83),
                Published("DAPO", QWEN_32B, 0.50, 0.60, 0.80),
                Published("FIPO", QWEN_MATH_7B, 0.40),
                Published("DAPO", QWEN_MATH_7B, 0.36),
                Published("FIPO", None, 0.546),
            ),
        ),
        EvaluationSet(
            "aime_2025",
            (
                Published("FIPO", QWEN_32B, 0.43, 0.50, 0.67),
                Published("DAPO", QWEN_32B, 0.38, 0.47, 0.63),
                Published("FIPO", QWEN_MATH_7B, 0.19),
                Published("DAPO", QWEN_MATH_7B, 0.18),
                Published("FIPO", None, 0.35),
            ),
        ),
        EvaluationSet("aime_2026", (Published("FIPO", None, 0.425),)),
        EvaluationSet("hmmt_feb_2025", (Published("FIPO", None, 0.215),)),
        EvaluationSet("hmmt_feb_2026", (Published("FIPO", None, 0.244),)),
        EvaluationSet("brumo_2025", (Published("FIPO", None, 0.521),)),
        EvaluationSet("gsm8k_test"),
    )
}


def find_sets(arguments: Sequence[str]) -> dict[str, Path]:
    """The file of each set, from `NAME` of a known one or `NAME=PATH` of any.

    Raises:
        ValueError: an unknown name, a name given twice or unfit for a file, or a file that does not exist.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals and name not in SETS:
            raise ValueError(f"set {name!r}: unknown; known: {', '.join(SETS)}; for a file of yours give NAME=PATH")
        if not name.replace("-", "_").isidentifier():
            raise ValueError(f"set {argument!r}: names are made of letters, digits, - and _; give NAME=PATH")
        if name in found:
            raise ValueError(f"set {name!r}: given twice; give each set once")
        found[name] = Path(path) if equals else SETS[name].path
        if not found[name].is_file():
            remedy = "correct the path" if equals else f"make it with tools/prepare_data.py {name}"
            raise ValueError(f"set {name!r}: no file {found[name]}; {remedy}")
    return found


def published_figures(name: str) -> tuple[Published, ...]:
    """What was published on the set; nothing for one that isn't known by name."""
    return SETS[name].published if name in SETS else ()
