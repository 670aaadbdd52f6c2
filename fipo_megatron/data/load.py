"""From a file as the configuration names it to its problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fipo_megatron.config.schema import DataConfig, DataFileConfig
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

    def results(self) -> Iterator[ReadResult]:
        """All of them."""
        yield from self.train
        yield from self.evaluation.values()


def load_files(data: DataConfig) -> ProblemFiles:
    """The problems of all files of a configuration.

    Raises:
        ValueError: a file can't be used, or two training files name a problem alike.
    """
    train = tuple(load_problems(file, data.max_corrupt_frac) for file in data.train)
    paths: dict[str, Path] = {}
    for result in train:
        for problem in result.problems:
            if problem.uid in paths:
                raise ValueError(
                    f"data.train: {paths[problem.uid]} and {result.path} both have a problem {problem.uid!r}; "
                    "give one of them another data_source"
                )
        paths |= dict.fromkeys((problem.uid for problem in result.problems), result.path)
    return ProblemFiles(train, {name: load_problems(file, data.max_corrupt_frac) for name, file in data.eval.items()})


def load_problems(file: DataFileConfig, max_corrupt_frac: float) -> ReadResult:
    """The problems of a file and the rows that were left out.

    Raises:
        ValueError: the file is missing, of an unknown format, holds no problem, or more than the share
            `max_corrupt_frac` of its rows can't be read.
    """
    path = Path(file.path)
    match detect_format(path) if file.format == "auto" else file.format:
        case "parquet":
            result = read_parquet(path, file.data_source)
        case "gsm8k":
            result = read_gsm8k(path, file.data_source or "gsm8k")
        case "aime":
            result = read_aime(path, file.data_source or path.stem)
        case _:
            assert file.question is not None
            assert file.answer is not None
            fields = QuestionFields(file.question, file.answer, file.uid)
            result = read_questions(path, fields, file.data_source or path.stem)
    check_corrupt_share(result, max_corrupt_frac)
    return result


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
