"""Duplicates, contradictions and contamination on cases worked out by hand, overlaps against brute force."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from fipo_megatron.data.prepare import (
    EvaluationIndex,
    Question,
    Report,
    bare_questions,
    merge_duplicates,
    normalize,
    prepare,
    word_ngrams,
    write_problems,
    write_reports,
)
from fipo_megatron.data.readers import Message, Problem, ReadResult, RejectedRows, read_parquet

INSTRUCTED = "Solve it. Answer: $Answer.\n\n{}\n\nRemember the last line."


def problem(text: str, truth: str = "1", uid: str = "u", *, has_instruction: bool = False) -> Problem:
    return Problem(uid, (Message("user", text),), truth, "math", has_instruction)


def texts(problems: list[Problem]) -> list[str]:
    return [question.text for question in bare_questions(problems)]


def read(*problems: Problem) -> ReadResult:
    return ReadResult(Path("x"), problems, (RejectedRows("rows 5 to 7", 3, "are damaged"),))


def words(start: int, end: int) -> str:
    return " ".join(f"w{i}" for i in range(start, end))


def test_texts_differ_by_what_mathematics_reads():
    assert normalize("  Find\u00a0$X$,\n where  x\u00b2 ") == normalize("find $x$, where x2")
    assert normalize("2 + 3") != normalize("2 - 3")
    assert normalize("x < 1") != normalize("x > 1")


def test_an_instruction_that_a_file_repeats_is_no_part_of_the_question():
    rows = [problem(INSTRUCTED.format(text), has_instruction=True) for text in ("One?", "Two?\n\nHint: 2.", "One?")]
    assert texts(rows) == ["one?", "two? hint: 2.", "one?"]
    other = problem("Say it.\n\nThree?", has_instruction=True)
    assert texts([*rows, other, problem(INSTRUCTED.format("4?"), has_instruction=True)])[3] == "say it. three?"


def test_a_bare_question_is_left_whole():
    rows = [problem(INSTRUCTED.format(i)) for i in range(3)]
    assert texts(rows)[0] == normalize(INSTRUCTED.format(0))
    same = [problem("One paragraph", has_instruction=True)] * 3
    assert texts(same) == ["one paragraph"] * 3
    assert texts([]) == []


def test_the_first_of_each_question_stays_and_contradictions_go():
    rows = [("a", "1"), ("b", "2"), ("A ", " 1"), ("b", "3"), ("c", "4"), ("a", "1")]
    questions = [Question(problem(text, truth, f"u{i}"), normalize(text)) for i, (text, truth) in enumerate(rows)]
    kept, num_duplicates, conflicts = merge_duplicates(questions)
    assert [question.problem.uid for question in kept] == ["u0", "u4"]
    assert num_duplicates == 2
    assert [[question.problem.uid for question in copies] for copies in conflicts] == [["u1", "u3"]]


@pytest.mark.parametrize(
    ("train", "is_contaminated"),
    [
        (words(0, 30), True),
        (words(0, 30).upper(), True),
        (words(0, 21) + " " + words(100, 130), True),  # 9 of the 18 n-grams of 30 words
        (words(0, 20) + " " + words(100, 130), False),  # 8
        (words(8, 21), True),  # its only one
        (words(8, 20), False),  # none: too short
        ("short text", True),
        ("short texts", False),
    ],
)
def test_contamination_begins_at_half_of_the_shorter_ones_ngrams(train, is_contaminated):
    index = EvaluationIndex({"aime": bare_questions([problem(words(0, 30)), problem("Short  text")])})
    (question,) = bare_questions([problem(train)])
    assert index.find_set(question) == ("aime" if is_contaminated else None)


def test_overlaps_are_those_of_brute_force():
    rng = random.Random(0)
    base = [f"w{rng.randrange(6)}" for _ in range(60)]

    def cut() -> str:
        start = rng.randrange(45)
        return " ".join([*base[start : start + rng.randrange(10, 40)], *(f"x{rng.randrange(9)}" for _ in range(10))])

    evaluation = {name: [problem(cut()) for _ in range(4)] for name in ("one", "two")}
    index = EvaluationIndex({name: bare_questions(problems) for name, problems in evaluation.items()})

    def ngrams(text: str) -> set[str]:
        parts = text.split()
        return {" ".join(parts[i : i + 13]) for i in range(len(parts) - 12)}

    def contaminates(other: Problem, text: str) -> bool:
        mine, theirs = ngrams(text), ngrams(other.messages[0].content)
        return bool(mine and theirs) and len(mine & theirs) / min(len(mine), len(theirs)) >= 0.5

    found = []
    for _ in range(300):
        text = cut()
        sets = [name for name, rows in evaluation.items() if any(contaminates(row, text) for row in rows)]
        found.append(sets[0] if sets else None)
        assert index.find_set(bare_questions([problem(text)])[0]) == found[-1]
    assert min(found.count(name) for name in ("one", "two", None)) > 10


def test_ngrams_have_thirteen_words():
    assert [len(ngram) for ngram in word_ngrams(words(0, 14))] == [13, 13]
    assert word_ngrams(words(0, 12)) == frozenset()


def test_a_report_accounts_for_every_row():
    held_out = words(0, 20)
    rows = [("a", "1"), ("a", "1"), ("b", "1"), ("b", "2"), ("b", "2"), (held_out, "5"), ("c", "6"), ("d", "7")]
    problems = [problem(text, truth, f"u{i}") for i, (text, truth) in enumerate(rows)]
    index = EvaluationIndex({"aime": bare_questions([problem(held_out)]), "hmmt": bare_questions([problem(held_out)])})
    kept, report = prepare(read(*problems), index)
    assert [row.uid for row in kept] == ["u0", "u6", "u7"]
    assert report == Report(
        rows_read=11,
        rejected=3,
        duplicates=1,
        conflicting=3,
        written=3,
        contaminated={"aime": 1},
        decontaminated_against=("aime", "hmmt"),
        rejected_examples=("rows 5 to 7 are damaged",),
        conflict_examples=("u2: '1', '2'",),
    )
    assert prepare(read(*problems), None)[1].written == 4


def test_bare_questions_are_written_bare_with_their_solutions(tmp_path):
    path = tmp_path / "out.parquet"
    problems = [problem("What is {question}?", "7", "u1"), replace(problem("Six?", "6"), solution="1 + 5 = 6")]
    write_problems(problems, path)
    assert list(read_parquet(path).problems) == [
        replace(problems[0], uid="math/out/000001"),
        replace(problems[1], uid="math/out/000002"),
    ]
    assert read_parquet(path, "mine").problems[0].data_source == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"]
    write_problems(problems[:1], path)
    assert pyarrow_types(path) == dict.fromkeys(("uid", "data_source", "question", "answer", "solution"), "string")


def pyarrow_types(path: Path) -> dict[str, str]:
    from pyarrow.parquet import read_schema

    return {field.name: str(field.type) for field in read_schema(path)}


def test_rows_with_an_instruction_of_their_own_keep_it(tmp_path):
    path = tmp_path / "out.parquet"
    chat = (Message("system", "Be brief."), Message("user", "Whole prompt"))
    written = Problem("u2", chat, r"\frac{1}{2}", "math", True)
    write_problems([written], path)
    assert list(read_parquet(path).problems) == [replace(written, uid="math/out/000001")]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"
    write_problems([problem("old")], path)
    before = path.read_bytes()

    def write_half(table, where, **options):
        Path(where).write_bytes(b"PAR1")
        raise OSError("no space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", write_half)
    with pytest.raises(OSError, match="no space left"):
        write_problems([problem("new")], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"]


def test_reports_of_other_sources_stay(tmp_path):
    path = tmp_path / "report.json"
    report = prepare(read(problem("a")), None)[1]
    write_reports({"one": report, "two": report}, path)
    write_reports({"two": prepare(read(problem("a"), problem("b")), None)[1]}, path)
    assert {name: row["written"] for name, row in json.loads(path.read_text()).items()} == {"one": 1, "two": 2}
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not a report of an earlier call; move it away"):
        write_reports({"one": report}, path)
