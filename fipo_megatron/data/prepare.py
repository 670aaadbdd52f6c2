"""Makes clean files of problems: no duplicates, no contradictions, and in training sets nothing that is evaluated on.

Two questions are the same if their texts are, after Unicode compatibility, case and white space. A training problem is
contaminated by an evaluation problem if both are the same, or if they share at least half of the n-grams of 13 words of
the one that has fewer: half, because long stock phrases ("where m and n are relatively prime positive integers ...")
are no overlap. A question of less than 13 words is compared as a whole only.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fipo_megatron.data.readers import Problem, ReadResult

NGRAM_WORDS = 13
MAX_OVERLAP = 0.5
INSTRUCTION_SHARE = 0.5  # of a file's texts: a paragraph in more of them is no part of the question
NUM_EXAMPLES = 20  # of rejected rows and contradictions in a report; all are counted

Ngrams = frozenset[tuple[str, ...]]


class Question(NamedTuple):
    """A problem, and the text by which it is compared with others."""

    problem: Problem
    text: str  # normalised, without instruction


@dataclass(frozen=True)
class Report:
    """What became of the rows of one source: `rows_read` is the sum of the next four and of those contaminated."""

    rows_read: int
    rejected: int
    duplicates: int  # of an earlier row, with the same answer
    conflicting: int  # all rows of questions that have several answers
    written: int
    contaminated: dict[str, int]  # by the evaluation set that holds them; a row counts for the first of them
    decontaminated_against: tuple[str, ...]
    rejected_examples: tuple[str, ...]
    conflict_examples: tuple[str, ...]


def bare_questions(problems: Sequence[Problem]) -> list[Question]:
    """Each problem with its question's normalised text, in order.

    Of problems that carry an instruction, a first or last paragraph that more than half of the file's different texts
    share is taken for it, and left out.
    """
    # Published files repeat a problem a hundred times: each different text is taken apart once.
    paragraphs = {content: content.strip().split("\n\n") for content in {p.messages[-1].content for p in problems}}
    most = max(INSTRUCTION_SHARE * len(paragraphs), 1)
    firsts = Counter(texts[0] for texts in paragraphs.values())
    lasts = Counter(texts[-1] for texts in paragraphs.values())

    def bare(texts: list[str]) -> str:
        if len(texts) > 1 and firsts[texts[0]] > most:
            texts = texts[1:]
        if len(texts) > 1 and lasts[texts[-1]] > most:
            texts = texts[:-1]
        return normalize("\n\n".join(texts))

    whole = {content: normalize(content) for content in paragraphs}
    without_instruction = {content: bare(texts) for content, texts in paragraphs.items()}
    return [
        Question(problem, (without_instruction if problem.has_instruction else whole)[problem.messages[-1].content])
        for problem in problems
    ]


def normalize(text: str) -> str:
    """The text by which two questions are compared: compatible Unicode, no case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def word_ngrams(text: str) -> Ngrams:
    """All runs of 13 words of a text; none if it has fewer."""
    words = re.findall(r"\w+", text)
    return frozenset(tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1))


def merge_duplicates(questions: Iterable[Question]) -> tuple[list[Question], int, list[list[Question]]]:
    """The first of each question, in order, how many repeat it, and those left out because their answers differ."""
    same: dict[str, list[Question]] = {}
    for question in questions:
        same.setdefault(question.text, []).append(question)
    kept, num_duplicates, conflicts = [], 0, []
    for copies in same.values():
        if len({question.problem.ground_truth.strip() for question in copies}) > 1:
            conflicts.append(copies)
        else:
            kept.append(copies[0])
            num_duplicates += len(copies) - 1
    return kept, num_duplicates, conflicts


class EvaluationIndex:
    """The questions of evaluation sets, to be looked up by whole text and by n-gram."""

    def __init__(self, sets: Mapping[str, Sequence[Question]]) -> None:
        self.names = tuple(sets)
        self._set_of_text: dict[str, str] = {}
        self._questions: list[tuple[str, int]] = []  # set and number of n-grams of each
        self._with_ngram: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for name, questions in sets.items():
            for question in questions:
                self._set_of_text.setdefault(question.text, name)
                ngrams = word_ngrams(question.text)
                for ngram in ngrams:
                    self._with_ngram[ngram].append(len(self._questions))
                self._questions.append((name, len(ngrams)))

    def find_set(self, question: Question) -> str | None:
        """The first set, in order, that contaminates the question; None if none does."""
        found = {self._set_of_text[question.text]} if question.text in self._set_of_text else set()
        ngrams = word_ngrams(question.text)
        shared = Counter(i for ngram in ngrams for i in self._with_ngram.get(ngram, ()))
        for i, num_shared in shared.items():
            name, num_ngrams = self._questions[i]
            if num_shared >= MAX_OVERLAP * min(len(ngrams), num_ngrams):
                found.add(name)
        return next((name for name in self.names if name in found), None)


def prepare(result: ReadResult, evaluation: EvaluationIndex | None) -> tuple[list[Problem], Report]:
    """The problems of a file that are worth keeping, and what became of the others.

    `evaluation` holds the sets that a training file must not share problems with; None for an evaluation set.
    """
    kept, num_duplicates, conflicts = merge_duplicates(bare_questions(result.problems))
    found = [None if evaluation is None else evaluation.find_set(question) for question in kept]
    clean = [question.problem for question, name in zip(kept, found, strict=True) if name is None]
    return clean, Report(
        rows_read=result.num_rows,
        rejected=result.num_rejected,
        duplicates=num_duplicates,
        conflicting=sum(map(len, conflicts)),
        written=len(clean),
        contaminated=dict(Counter(name for name in found if name is not None)),
        decontaminated_against=() if evaluation is None else evaluation.names,
        rejected_examples=tuple(f"{rows.place} {rows.reason}" for rows in result.rejected[:NUM_EXAMPLES]),
        conflict_examples=tuple(map(_describe_conflict, conflicts[:NUM_EXAMPLES])),
    )


def _describe_conflict(copies: Sequence[Question]) -> str:
    answers = dict.fromkeys(question.problem.ground_truth.strip() for question in copies)
    return f"{copies[0].problem.uid}: {', '.join(map(repr, answers))}"


def write_problems(problems: Sequence[Problem], path: Path) -> None:
    """Writes parquet that `readers.read_parquet` reads: problems with an instruction in DAPO's layout, bare questions
    bare, so that each run chooses the template. All problems are of one kind. The file appears whole or not at all.

    `extra_info.index`, or `uid`, is the problem's uid, which names the row that it was read from.
    """
    import pyarrow
    from pyarrow import parquet

    (has_instruction,) = {problem.has_instruction for problem in problems}
    rows = list(map(_dapo_row if has_instruction else _bare_row, problems))
    schema = None if has_instruction else pyarrow.schema([(name, pyarrow.string()) for name in rows[0]])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), temporary, write_page_checksum=True)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _dapo_row(problem: Problem) -> dict[str, Any]:
    return {
        "data_source": problem.data_source,
        "prompt": [message._asdict() for message in problem.messages],
        "ability": "MATH",
        "reward_model": {"ground_truth": problem.ground_truth, "style": "rule"},
        "extra_info": {"index": problem.uid},
    }


def _bare_row(problem: Problem) -> dict[str, Any]:
    (question,) = problem.messages
    return {
        "uid": problem.uid,
        "data_source": problem.data_source,
        "question": question.content,
        "answer": problem.ground_truth,
        "solution": problem.solution,
    }


def write_reports(reports: Mapping[str, Report], path: Path) -> None:
    """Writes the reports as one JSON object by source; those of other sources that the file holds already stay.

    Raises:
        ValueError: what is there is no such file.
    """
    before: Any = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(f"{path}: is not a report of an earlier call; move it away")
    merged = before | {name: asdict(report) for name, report in reports.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
