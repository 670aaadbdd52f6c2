"""From a file as the configuration names it to its problems."""

from __future__ import annotations

from pathlib import Path

from fipo_megatron.config.schema import DataFileConfig
from fipo_megatron.data.readers import (
    QuestionFields,
    ReadResult,
    iterate_json_lines,
    read_aime,
    read_gsm8k,
    read_parquet,
    read_questions,
)


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
