"""From files as the configuration names them to their problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fipo_megatron.config.problems import ANSWER_TEMPLATE, DataConfig, DataFileConfig
from fipo_megatron.data.prepare import bare_questions
from fipo_megatron.data.readers import (
    QuestionFields,
    ReadResult,
    iterate_json_lines,
    read_aime,
    read_gsm8k,
    read_parquet,
    read_questions,
)


@dataclass(frozen=True)
class ProblemFiles:
    """What the files of a configuration hold."""

    train: tuple[ReadResult, ...]  # in the order of data.train
    evaluation: dict[str, ReadResult]  # by name of the set


def load_files(data: DataConfig) -> ProblemFiles:
    """The problems of all files of a configuration.

    Raises:
        ValueError: a file can't be used, two training files name a problem alike, a training file and an evaluation set
            share a question, or `data.template` is set and no problem would be put into it.
    """
    train = tuple(load_problems(file, data.max_corrupt_frac) for file in data.train)
    _check_uids(train)
    evaluation = load_evaluation_sets(data)
    _check_disjoint(train, evaluation)
    _check_template(data, [*train, *evaluation.values()])
    return ProblemFiles(train, evaluation)


def _check_uids(train: Sequence[ReadResult]) -> None:
    paths: dict[str, Path] = {}
    for result in train:
        for problem in result.problems:
            if problem.uid in paths:
                raise ValueError(
                    f"data.train: {paths[problem.uid]} and {result.path} both have a problem {problem.uid!r}; "
                    "give one of them another data_source"
                )
        paths |= dict.fromkeys((problem.uid for problem in result.problems), result.path)


def _check_disjoint(train: Sequence[ReadResult], evaluation: Mapping[str, ReadResult]) -> None:
    """Raises ValueError if a question, compared as data/prepare.py does, is both trained and evaluated on."""
    held_out = {result.path: _question_texts(result) for result in evaluation.values()}
    shared = []
    for result in train if held_out else ():
        texts = _question_texts(result)
        counts = {path: len(texts & others) for path, others in held_out.items()}
        shared += [f"{count} both in {result.path} and in {path}" for path, count in counts.items() if count]
    if shared:
        raise ValueError(
            f"data.train and data.eval share questions: {'; '.join(shared)}; take them out of the training file: "
            "tools/prepare_data.py decontaminates"
        )


def _check_template(data: DataConfig, results: Sequence[ReadResult]) -> None:
    instructed = all(problem.has_instruction for result in results for problem in result.problems)
    if results and instructed and data.template != ANSWER_TEMPLATE:
        raise ValueError(
            f"data.template = {data.template!r:.80}: has no effect: all rows have their own instruction; remove it"
        )


def _question_texts(result: ReadResult) -> set[str]:
    return {question.text for question in bare_questions(result.problems)}


def load_evaluation_sets(data: DataConfig) -> dict[str, ReadResult]:
    """The evaluation sets of a configuration by name; a ValueError if one can't be used."""
    return {name: load_evaluation_set(file) for name, file in data.eval.items()}


def load_evaluation_set(file: DataFileConfig) -> ReadResult:
    """All problems of a file.

    Raises:
        ValueError: the file is missing, of an unknown format, holds no problem, or a row that can't be read.
    """
    result = _read(file)
    if result.rejected:
        raise ValueError(
            f"{result.describe_rejected()}; correct the file: an accuracy over a part of an evaluation set can't be "
            "compared with others"
        )
    return result


def load_problems(file: DataFileConfig, max_corrupt_frac: float) -> ReadResult:
    """The problems of a training file and the rows that were left out.

    Raises:
        ValueError: the file is missing, of an unknown format, holds no problem, or more than the share
            `max_corrupt_frac` of its rows can't be read.
    """
    result = _read(file)
    check_corrupt_share(result, max_corrupt_frac)
    return result


def load_first_problems(file: DataFileConfig, max_rows: int) -> ReadResult:
    """What the first rows of a file hold; a ValueError if it can't be read, or none of them."""
    return _read(file, max_rows)


def _read(file: DataFileConfig, max_rows: int | None = None) -> ReadResult:
    path = Path(file.path)
    match detect_format(path) if file.format == "auto" else file.format:
        case "parquet":
            return read_parquet(path, file.data_source, max_rows)
        case "gsm8k":
            return read_gsm8k(path, file.data_source or "gsm8k", max_rows)
        case "aime":
            return read_aime(path, file.data_source or path.stem, max_rows)
        case _:
            assert file.question is not None
            assert file.answer is not None
            fields = QuestionFields(file.question, file.answer, file.uid)
            return read_questions(path, fields, file.data_source or path.stem, max_rows)


def detect_format(path: Path) -> str:
    """`parquet` by the suffix, else `gsm8k` or `aime` by the fields of the first line that can be read.

    Raises:
        ValueError: they tell nothing.
    """
    if path.suffix == ".parquet":
        return "parquet"
    first = next((row.fields for row in iterate_json_lines(path) if row.fields is not None), None)
    if first is None:
        raise ValueError(f"{path}: holds no problems: no line is a JSON object; give a file with at least one")
    if "question" in first and "####" in str(first.get("answer")):
        return "gsm8k"
    if {"id", "problem", "answer"} <= first.keys():
        return "aime"
    raise ValueError(
        f"{path}: the fields {', '.join(map(repr, first))} are those of no known format; declare its fields, "
        "e.g. {path: ..., format: jsonl, question: question, answer: answer}"
    )


def check_corrupt_share(result: ReadResult, max_corrupt_frac: float) -> None:
    """Raises ValueError if more than this share of the file's rows can't be read."""
    if result.num_rejected > max_corrupt_frac * result.num_rows:
        raise ValueError(
            f"{result.describe_rejected()}; correct the file, or raise data.max_corrupt_frac = {max_corrupt_frac:g}"
        )
