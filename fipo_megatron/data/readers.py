"""Problems from files: GSM8K, AIME, any JSON lines with a question and an answer, and parquet in DAPO's layout.

A row that can't be read is an error that names file and line: a problem silently left out would change what is trained
on or measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

GSM8K_ANSWER = re.compile(r"^####[ \t]*(-?[\d,]*\d(?:\.\d+)?)\s*\Z", re.MULTILINE)
PARQUET_COLUMNS = ("prompt", "reward_model", "data_source")
ROLES = ("system", "user", "assistant")

Row = TypeVar("Row")


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Problem:
    """One problem as its file states it; how it is put to the policy is the chat template's matter."""

    uid: str  # data source, file and line, or the file's own number; unique within a file
    messages: tuple[Message, ...]  # the last is the user's
    ground_truth: str
    data_source: str


@dataclass(frozen=True)
class JsonlFields:
    """Names of the fields in which a line holds what a problem needs."""

    question: str
    answer: str
    uid: str | None = None  # None: the line's number


def read_gsm8k(path: Path) -> list[Problem]:
    """The problems of a GSM8K file; the ground truth is the number after `####`, without commas."""
    return read_jsonl(path, JsonlFields("question", "answer"), "gsm8k", _parse_gsm8k_answer)


def read_aime(path: Path, data_source: str) -> list[Problem]:
    """The problems of an AIME file (`id`, `problem`, `answer`); the ground truth has no leading zeros.

    AIME writes answers with three digits (`025`), policies write 25, and DAPO's rule compares them as text.
    """
    return read_jsonl(path, JsonlFields("problem", "answer", uid="id"), data_source, _parse_aime_answer)


def read_jsonl(
    path: Path, fields: JsonlFields, data_source: str, parse_answer: Callable[[str], str] = str
) -> list[Problem]:
    """The problems of a file with one JSON object a line, each question a single message of the user.

    `parse_answer` makes the ground truth of the answer field; whole numbers count as text. No problems, a repeated uid
    or a line that can't be read is a ValueError with its place.
    """

    def parse(number: int, line: bytes) -> Problem:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"holds {row!r}, not an object")
        return Problem(
            uid=_make_uid(path, data_source, number if fields.uid is None else _read_text(row, fields.uid)),
            messages=(Message("user", _read_text(row, fields.question)),),
            ground_truth=parse_answer(_read_text(row, fields.answer)),
            data_source=data_source,
        )

    _check_file(path)
    with path.open("rb") as lines:
        return _collect(path, "line", lines, parse)


def read_parquet(path: Path) -> list[Problem]:
    """The problems of a parquet file in DAPO's layout: a chat in `prompt`, `reward_model.ground_truth`, `data_source`.

    A missing column, no problems, or a row that can't be read is a ValueError with its place.
    """

    def parse(number: int, row: dict[str, Any]) -> Problem:
        data_source = _read_text(row, "data_source")
        if not isinstance(row["reward_model"], dict):
            raise ValueError(f"reward_model = {row['reward_model']!r}: must hold a ground_truth")
        return Problem(
            uid=_make_uid(path, data_source, number),
            messages=_read_chat(row["prompt"]),
            ground_truth=_read_text(row["reward_model"], "ground_truth"),
            data_source=data_source,
        )

    _check_file(path)
    return _collect(path, "row", _iterate_parquet(path), parse)


def _iterate_parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            missing = [name for name in PARQUET_COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(
                    f"{path}: has no column {', '.join(missing)}, only {', '.join(file.schema_arrow.names)}; "
                    "rename its columns"
                )
            for batch in file.iter_batches(columns=list(PARQUET_COLUMNS)):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: is not parquet, or damaged ({error}); copy the file again") from None


def _collect(path: Path, unit: str, rows: Iterable[Row], parse: Callable[[int, Row], Problem]) -> list[Problem]:
    """The problems of all rows, counted from 1; a ValueError of `parse` gets the row's place."""
    problems: dict[str, Problem] = {}
    for number, row in enumerate(rows, start=1):
        try:
            problem = parse(number, row)
            if problem.uid in problems:
                raise ValueError(f"uid {problem.uid!r} is that of an earlier {unit}")
        except ValueError as error:
            raise ValueError(f"{path}, {unit} {number}: {error}; correct or remove the {unit}") from None
        problems[problem.uid] = problem
    if not problems:
        raise ValueError(f"{path}: holds no problems; give a file with at least one")
    return list(problems.values())


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; correct the path")


def _make_uid(path: Path, data_source: str, identifier: int | str) -> str:
    number = f"{identifier:06d}" if isinstance(identifier, int) else identifier
    return f"{data_source}/{path.stem}/{number}"


def _read_text(row: dict[str, Any], field: str) -> str:
    if field not in row:
        raise ValueError(f"has no field {field!r}, only {', '.join(map(repr, row)) or 'an empty object'}")
    value = row[field]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} = {value!r}: must be text that is not empty, or a whole number")
    return value


def _read_chat(prompt: Any) -> tuple[Message, ...]:
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        raise ValueError(f"prompt = {prompt!r}: must be a list of messages")
    messages = tuple(Message(_read_text(turn, "role"), _read_text(turn, "content")) for turn in prompt)
    unknown = [message.role for message in messages if message.role not in ROLES]
    if unknown:
        raise ValueError(f"prompt has the role {unknown[0]!r}; known: {', '.join(ROLES)}")
    if not messages or messages[-1].role != "user":
        raise ValueError("prompt must end with a message of the user")
    return messages


def _parse_gsm8k_answer(answer: str) -> str:
    match = GSM8K_ANSWER.search(answer)
    if match is None:
        raise ValueError(f"answer ends in {answer[-30:]!r}: its last line must be `#### ` and a number")
    return match[1].replace(",", "")


def _parse_aime_answer(answer: str) -> str:
    if re.fullmatch(r"\d{1,3}", answer, re.ASCII) is None:
        raise ValueError(f"answer = {answer!r}: must be a whole number from 0 to 999")
    return str(int(answer))
