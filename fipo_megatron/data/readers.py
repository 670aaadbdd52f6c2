"""Problems from files: GSM8K, AIME, any JSON lines with a question and an answer, and parquet in two layouts.

Rows that can't be read are left out, and named in what the readers return: whoever asked decides how many are too many.
A file without a problem, or of another format altogether, is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GSM8K_ANSWER = re.compile(r"^####[ \t]*(-?[\d,]*\d(?:\.\d+)?)\s*\Z", re.MULTILINE)
GSM8K_CALCULATION = re.compile(r"<<[^<>\n]*>>")  # a calculator's note inside a solution
# Layouts of parquet files.
DAPO_COLUMNS = ("prompt", "reward_model", "data_source")  # a chat with its instruction, and reward_model.ground_truth
BARE_COLUMNS = ("question", "answer", "solution", "data_source")  # as prepared: the instruction is the run's matter
ROLES = ("system", "user", "assistant")
NUM_NAMED = 3  # rejected rows that a summary names; all are counted


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Problem:
    """One problem as its file states it; how it is put to the policy is data/encoding.py's matter."""

    uid: str  # data source, file and line, or the file's own number; unique within a file
    messages: tuple[Message, ...]  # the last is the user's
    ground_truth: str
    data_source: str
    has_instruction: bool = False  # the messages say already how to answer, as rows in DAPO's layout do
    solution: str | None = None  # worked steps that lead to the answer, without the answer's line


class RejectedRows(NamedTuple):
    """Rows that could not be read."""

    place: str  # e.g. "line 12", "rows 1001 to 2000"
    num_rows: int
    reason: str


@dataclass(frozen=True)
class ReadResult:
    """What a file holds: its problems in order, and what was left out."""

    path: Path
    problems: tuple[Problem, ...]
    rejected: tuple[RejectedRows, ...]

    @property
    def num_rejected(self) -> int:
        return sum(rows.num_rows for rows in self.rejected)

    @property
    def num_rows(self) -> int:
        return len(self.problems) + self.num_rejected

    def describe_rejected(self) -> str:
        """One line: how many rows were left out, and place and reason of the first."""
        named = "; ".join(f"{rows.place} {rows.reason}" for rows in self.rejected[:NUM_NAMED])
        rest = "; ..." if len(self.rejected) > NUM_NAMED else ""
        return f"{self.path}: {self.num_rejected} of {self.num_rows} rows can't be read: {named}{rest}"


class Row(NamedTuple):
    """One row before it is understood: a mapping of fields to values, or the reason why it is none."""

    place: str
    number: int  # in the file, from 1; of a stretch the last
    fields: dict[str, Any] | None
    reason: str = ""
    num_rows: int = 1  # more than one where a stretch of a file is damaged


@dataclass(frozen=True)
class QuestionFields:
    """Where a row of a question and an answer holds what a problem needs."""

    question: str
    answer: str
    uid: str | None = None  # None: the row's number
    parse_answer: Callable[[str], str] = str  # ground truth of the answer field; a ValueError if it holds none
    parse_solution: Callable[[str], str | None] = lambda answer: None  # worked steps of the answer field


def read_gsm8k(path: Path, data_source: str = "gsm8k", max_rows: int | None = None) -> ReadResult:
    """The problems of a GSM8K file; the ground truth is the number after `####`, without commas."""
    return read_questions(path, GSM8K_FIELDS, data_source, max_rows)


def read_aime(path: Path, data_source: str, max_rows: int | None = None) -> ReadResult:
    """The problems of an AIME file (`id`, `problem`, `answer`); the ground truth has no leading zeros.

    AIME writes answers with three digits (`025`), policies write 25, and DAPO's rule compares them as text.
    """
    return read_questions(path, AIME_FIELDS, data_source, max_rows)


def read_questions(path: Path, fields: QuestionFields, data_source: str, max_rows: int | None = None) -> ReadResult:
    """The problems of a file of questions with answers, each question a single message of the user.

    The file is parquet, or has one JSON object a line; numbers count as text. Of `max_rows` rows, or of all.

    Raises:
        ValueError: the file can't be read, or no row of it.
    """

    def parse(number: int, row: dict[str, Any]) -> Problem:
        answer = _read_text(row, fields.answer)
        return Problem(
            uid=_make_uid(path, data_source, number if fields.uid is None else _read_text(row, fields.uid)),
            messages=(Message("user", _read_text(row, fields.question)),),
            ground_truth=fields.parse_answer(answer),
            data_source=data_source,
            solution=fields.parse_solution(answer),
        )

    columns = tuple(name for name in (fields.question, fields.answer, fields.uid) if name is not None)
    rows = iterate_parquet(path, columns) if path.suffix == ".parquet" else iterate_json_lines(path)
    return _collect(path, islice(rows, max_rows), parse)


def read_parquet(path: Path, data_source: str | None = None, max_rows: int | None = None) -> ReadResult:
    """The problems of a parquet file in DAPO's layout or as data/prepare.py writes it: bare questions.

    `data_source` replaces the rows' own. Of `max_rows` rows, or of all.

    Raises:
        ValueError: the file is not parquet, lacks a column, or no row can be read.
    """

    columns = parquet_layout(path) or DAPO_COLUMNS

    def parse(number: int, row: dict[str, Any]) -> Problem:
        source = _read_text(row, "data_source") if data_source is None else data_source
        read = _read_bare_row if columns == BARE_COLUMNS else _read_dapo_row
        return read(row, _make_uid(path, source, number), source)

    return _collect(path, islice(iterate_parquet(path, columns), max_rows), parse)


def _read_dapo_row(row: dict[str, Any], uid: str, data_source: str) -> Problem:
    if not isinstance(row["reward_model"], dict):
        raise ValueError(f"reward_model = {row['reward_model']!r}: must hold a ground_truth")
    ground_truth = _read_text(row["reward_model"], "ground_truth")
    return Problem(uid, _read_chat(row["prompt"]), ground_truth, data_source, has_instruction=True)


def _read_bare_row(row: dict[str, Any], uid: str, data_source: str) -> Problem:
    messages = (Message("user", _read_text(row, "question")),)
    solution = None if row["solution"] is None else _read_text(row, "solution")
    return Problem(uid, messages, _read_text(row, "answer"), data_source, solution=solution)


def iterate_json_lines(path: Path) -> Iterator[Row]:
    """One row a line that is not blank."""
    _check_file(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Row(place, number, None, f"is not JSON ({error})")
                continue
            if isinstance(fields, dict):
                yield Row(place, number, fields)
            else:
                yield Row(place, number, None, f"holds {fields!r:.80}, not an object")


def parquet_layout(path: Path) -> tuple[str, ...] | None:
    """The columns of the layout that a parquet file has, `BARE_COLUMNS` or `DAPO_COLUMNS`; None for any other.

    Raises:
        ValueError: the file is not parquet.
    """
    with _open_parquet(path) as file:
        names = set(file.schema_arrow.names)
    return next((columns for columns in (BARE_COLUMNS, DAPO_COLUMNS) if names.issuperset(columns)), None)


def _open_parquet(path: Path) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    _check_file(path)
    try:
        return ParquetFile(path, page_checksum_verification=True)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: is not parquet, or damaged ({error}); copy the file again") from None


def iterate_parquet(path: Path, columns: Iterable[str]) -> Iterator[Row]:
    """One row a row; what is left of a damaged row group is one rejected stretch.

    Raises:
        ValueError: the file is not parquet, or lacks a column.
    """
    from pyarrow import ArrowException

    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        missing = [name for name in columns if name not in names]
        if missing:
            raise ValueError(f"{path}: has no column {', '.join(missing)}, only {', '.join(names)}; rename its columns")
        end = 0
        for group in range(file.num_row_groups):
            number, end = end, end + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(row_groups=[group], columns=list(columns)):
                    for fields in batch.to_pylist():
                        number += 1
                        yield Row(f"row {number}", number, fields)
            except (ArrowException, OSError, UnicodeDecodeError) as error:
                place = f"rows {number + 1} to {end}"
                yield Row(place, end, None, f"are damaged ({error})", num_rows=end - number)


def _collect(path: Path, rows: Iterable[Row], parse: Callable[[int, dict[str, Any]], Problem]) -> ReadResult:
    """The problems of all rows that `parse` makes one of; it is given the row's number, from 1."""
    problems: dict[str, Problem] = {}
    rejected = []
    for row in rows:
        if row.fields is None:
            rejected.append(RejectedRows(row.place, row.num_rows, row.reason))
            continue
        try:
            problem = parse(row.number, row.fields)
            if problem.uid in problems:
                raise ValueError(f"has the uid {problem.uid!r} of an earlier row")
        except ValueError as error:
            rejected.append(RejectedRows(row.place, 1, str(error)))
            continue
        problems[problem.uid] = problem
    result = ReadResult(path, tuple(problems.values()), tuple(rejected))
    if not rejected and not problems:
        raise ValueError(f"{path}: holds no problems; give a file with at least one")
    if not problems:
        raise ValueError(f"{result.describe_rejected()}; correct the file")
    return result


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; correct the path")


def _make_uid(path: Path, data_source: str, identifier: int | str) -> str:
    number = f"{identifier:06d}" if isinstance(identifier, int) else identifier
    return f"{data_source}/{path.stem}/{number}"


def _read_text(row: dict[str, Any], field: str) -> str:
    if field not in row:
        raise ValueError(f"has no field {field!r}, only {', '.join(map(repr, row)) or 'an empty object'}")
    text = as_text(row[field])
    if text is None or not text.strip():
        raise ValueError(f"{field} = {row[field]!r:.80}: must be text that is not empty, or a finite number")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"{field} holds {half!r}, one half of a surrogate pair: no text in UTF-8") from None
    return text


def as_text(value: Any) -> str | None:
    """A text itself, a finite number as a person writes it (0.5; 25 for 25.0); None for any other value."""
    match value:
        case str():
            return value
        case bool():
            return None
        case int():
            return str(value)
        case float() if math.isfinite(value):
            return np.format_float_positional(value, trim="-")
    return None


def _read_chat(prompt: Any) -> tuple[Message, ...]:
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        raise ValueError(f"prompt = {prompt!r:.80}: must be a list of messages")
    messages = tuple(Message(_read_text(turn, "role"), _read_text(turn, "content")) for turn in prompt)
    unknown = [message.role for message in messages if message.role not in ROLES]
    if unknown:
        raise ValueError(f"prompt has the role {unknown[0]!r}; known: {', '.join(ROLES)}")
    if not messages or messages[-1].role != "user":
        raise ValueError("prompt must end with a message of the user")
    return messages


def parse_gsm8k_answer(answer: str) -> str:
    """The number after `####` in the last line, without commas."""
    match = GSM8K_ANSWER.search(answer)
    if match is None:
        raise ValueError(f"answer ends in {answer[-30:]!r}: its last line must be `#### ` and a number")
    return match[1].replace(",", "")


def parse_gsm8k_solution(answer: str) -> str | None:
    """The worked steps before `####`, without a calculator's notes (`<<48/2=24>>`); None if there are none."""
    return GSM8K_CALCULATION.sub("", GSM8K_ANSWER.sub("", answer)).strip() or None


def parse_aime_answer(answer: str) -> str:
    """A whole number from 0 to 999, without leading zeros."""
    if re.fullmatch(r"\d{1,3}", answer, re.ASCII) is None:
        raise ValueError(f"answer = {answer!r:.80}: must be a whole number from 0 to 999")
    return str(int(answer))


GSM8K_FIELDS = QuestionFields(
    "question", "answer", parse_answer=parse_gsm8k_answer, parse_solution=parse_gsm8k_solution
)
AIME_FIELDS = QuestionFields("problem", "answer", uid="id", parse_answer=parse_aime_answer)
