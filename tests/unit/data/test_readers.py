"""Readers on the real files where they are present, and on small ones with every fault that rejects a row."""

import json
import re
from pathlib import Path

import pytest

from fipo_megatron.data.readers import (
    Message,
    Problem,
    QuestionFields,
    ReadResult,
    RejectedRows,
    parse_gsm8k_solution,
    read_aime,
    read_gsm8k,
    read_parquet,
    read_questions,
)

FIELDS = QuestionFields("q", "a", uid="n")
NUMBERED = QuestionFields("q", "a")  # named by line


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows: dict | bytes) -> Path:
        path = tmp_path / "train.jsonl"
        path.write_bytes(
            b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
        )
        return path

    return write_rows


@pytest.fixture
def write_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: run make install")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write_rows(rows: list[dict], **options: object) -> Path:
        path = tmp_path / "dapo-math.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
        return path

    return write_rows


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def dapo_row(question: str, truth: str) -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": chat(("user", question)),
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "5e6f"},
    }


@pytest.mark.parametrize(("split", "count", "first_truth"), [("train", 7473, "72"), ("test", 1319, "18")])
def test_gsm8k_itself(shared_dir, split, count, first_truth):
    path = shared_dir / "data" / "gsm8k" / f"{split}.jsonl"
    result = read_gsm8k(path)
    problems = result.problems
    assert result.rejected == ()
    assert len({problem.uid for problem in problems}) == len(problems) == count
    assert problems[0].ground_truth == first_truth
    assert problems[0].uid == f"gsm8k/{split}/000001"
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert [problem.ground_truth for problem in problems] == [a.split("#### ")[-1].replace(",", "") for a in answers]


def test_aime_itself(shared_dir):
    problems = read_aime(shared_dir / "data" / "aime24" / "test.jsonl", "aime24").problems
    assert len(problems) == 30
    assert problems[0].uid == "aime24/test/60"
    assert problems[0].messages[0].content.startswith("Every morning Aya goes")
    truths = [problem.ground_truth for problem in problems]
    assert truths[0] == "204"
    assert truths[7] == "25"  # "025" in the file
    assert all(str(int(truth)) == truth for truth in truths)


def test_a_gsm8k_problem_in_full(write):
    answer = "#### is not it\n40 * 30 = <<40*30=1200>>1,200\n#### -1,200.50"
    path = write({"question": "How many?\u2028Really?", "answer": answer})
    question = Message("user", "How many?\u2028Really?")
    solution = "#### is not it\n40 * 30 = 1,200"
    problem = Problem("gsm8k/train/000001", (question,), "-1200.50", "gsm8k", solution=solution)
    assert read_gsm8k(path) == ReadResult(path, (problem,), ())


def test_an_answer_without_steps_has_no_solution():
    assert parse_gsm8k_solution("#### 7") is None
    assert parse_gsm8k_solution("<<1+1=2>>\n#### 2") is None


@pytest.mark.parametrize("answer", ["18", "#### ", "#### eighteen", "#### 18\nor 19", "#### ,", "x #### 18"])
def test_a_gsm8k_answer_without_its_number_is_refused(write, answer):
    path = write({"question": "q", "answer": "#### 1"}, {"question": "q", "answer": answer})
    (rejected,) = read_gsm8k(path).rejected
    assert (rejected.place, rejected.num_rows) == ("line 2", 1)
    assert rejected.reason.startswith(f"answer ends in {answer!r}: its last line must be")


@pytest.mark.parametrize(("answer", "truth"), [("025", "25"), ("000", "0"), ("7", "7"), (999, "999")])
def test_an_aime_answer_has_no_leading_zeros(write, answer, truth):
    (problem,) = read_aime(write({"id": 1, "problem": "p", "answer": answer}), "aime25").problems
    assert (problem.ground_truth, problem.data_source, problem.uid) == (truth, "aime25", "aime25/train/1")


@pytest.mark.parametrize("answer", ["1000", "-1", "3.5", "x", "\N{ARABIC-INDIC DIGIT THREE}", -4])
def test_an_answer_that_aime_cannot_have_is_refused(write, answer):
    with pytest.raises(ValueError, match="line 1 answer = .* from 0 to 999"):
        read_aime(write({"id": 1, "problem": "p", "answer": answer}), "aime25")


def test_declared_fields_and_the_lines_own_number(write):
    path = write({"q": "one", "a": 1, "n": "x1", "more": None}, {"q": "two", "a": "b", "n": 7})
    assert [(p.uid, p.messages[0].content, p.ground_truth) for p in read_questions(path, FIELDS, "mine").problems] == [
        ("mine/train/x1", "one", "1"),
        ("mine/train/7", "two", "b"),
    ]
    numbered = read_questions(path, QuestionFields("q", "a", parse_answer=str.upper), "mine").problems
    assert [(p.uid, p.ground_truth) for p in numbered] == [("mine/train/000001", "1"), ("mine/train/000002", "B")]


GOOD = {"q": "one", "a": "1", "n": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"q": "cut', r"is not JSON \(Invalid control character"),
        (b'{"q": "\xff", "a": "1", "n": 2}', r"is not JSON \('utf-8' codec"),
        (b"[1]", r"holds \[1\], not an object"),
        (b"[" * 100_000, r"is not JSON \(maximum recursion depth"),
        (b"{}", "has no field 'a', only an empty object"),
        ({"question": "one", "a": "1", "n": 2}, "has no field 'q', only 'question', 'a', 'n'"),
        (GOOD | {"n": 2, "q": " \n"}, r"q = ' \\n': must be text"),
        (GOOD | {"n": 2, "a": None}, "a = None: must be text"),
        (GOOD | {"n": 2, "a": True}, "a = True: must be text"),
        (b'{"q": "one", "a": NaN, "n": 2}', "a = nan: must be text"),
        (b'{"q": "one", "a": -Infinity, "n": 2}', "a = -inf: must be text"),
        (GOOD | {"n": 2, "q": "x\ud800"}, r"q holds '\\ud800', one half of a surrogate pair"),
        (GOOD | {"n": 2, "a": "\udc00"}, r"a holds '\\udc00', one half of a surrogate pair"),
        (GOOD | {"n": "\ud800"}, r"n holds '\\ud800', one half of a surrogate pair"),
        (b'{"q": "\xed\xa0\x80", "a": "1", "n": 2}', r"q holds '\\ud800', one half of a surrogate pair"),
        (GOOD, "has the uid 'mine/train/1' of an earlier row"),
    ],
)
def test_a_corrupt_line_is_left_out_and_named_with_its_place(write, row, message):
    path = write(GOOD, row, GOOD | {"n": 3})
    result = read_questions(path, FIELDS, "mine")
    assert [problem.uid for problem in result.problems] == ["mine/train/1", "mine/train/3"]
    ((place, num_rows, reason),) = result.rejected
    assert (place, num_rows, result.num_rejected, result.num_rows) == ("line 2", 1, 1, 3)
    assert re.match(message, reason)
    assert len(reason) < 200


def test_a_whole_surrogate_pair_is_a_character(write):
    (problem,) = read_questions(write(rb'{"q": "\ud83d\ude00", "a": "1", "n": 1}'), FIELDS, "mine").problems
    assert problem.messages[0].content == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("number", "text"), [(b"0.5", "0.5"), (b"25.0", "25"), (b"1e-7", "0.0000001"), (b"1E3", "1000"), (b"-3", "-3")]
)
def test_numbers_are_written_as_a_person_does(write, number, text):
    (problem,) = read_questions(write(b'{"q": "one", "a": %b, "n": 1}' % number), FIELDS, "mine").problems
    assert problem.ground_truth == text


def test_blank_lines_are_skipped_and_counted_as_lines(write):
    result = read_questions(
        write({"q": "one", "a": 1}, b"", b" \t\r", {"q": "two", "a": 2}, b"{", b""), NUMBERED, "mine"
    )
    assert [problem.uid for problem in result.problems] == ["mine/train/000001", "mine/train/000004"]
    assert [rows.place for rows in result.rejected] == ["line 5"]
    assert result.num_rows == 3


def test_a_summary_counts_all_and_names_the_first(write):
    result = read_questions(write(GOOD, *[b"{"] * 5), FIELDS, "mine")
    summary = result.describe_rejected()
    assert "train.jsonl: 5 of 6 rows can't be read: line 2 is not JSON" in summary
    assert "line 4 is" in summary
    assert "line 5" not in summary
    assert summary.endswith("; ...")


def test_a_file_without_a_usable_row_is_refused(write):
    with pytest.raises(ValueError, match=r"train\.jsonl: holds no problems"):
        read_questions(write(), FIELDS, "mine")
    with pytest.raises(ValueError, match=r"train\.jsonl: 2 of 2 rows can't be read: line 1 is not JSON"):
        read_questions(write(b"{", b"}"), FIELDS, "mine")


@pytest.mark.parametrize("read", [read_gsm8k, read_parquet])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(ValueError, match=r"none: no such file; correct the path"):
        read(tmp_path / "none")


def test_parquet_in_the_layout_of_dapo(write_parquet):
    rows = [dapo_row("one", "1"), dapo_row("two", "-2"), dapo_row("one", "1")]
    rows[1]["prompt"] = chat(("system", "be brief"), ("user", "u"), ("assistant", "a"), ("user", "two"))
    path = write_parquet(rows, row_group_size=2)
    assert list(read_parquet(path).problems) == [
        Problem("math_dapo/dapo-math/000001", (Message("user", "one"),), "1", "math_dapo", has_instruction=True),
        Problem(
            "math_dapo/dapo-math/000002",
            (Message("system", "be brief"), Message("user", "u"), Message("assistant", "a"), Message("user", "two")),
            "-2",
            "math_dapo",
            has_instruction=True,
        ),
        Problem("math_dapo/dapo-math/000003", (Message("user", "one"),), "1", "math_dapo", has_instruction=True),
    ]
    renamed = read_parquet(path, "mine").problems
    assert {(problem.data_source, problem.uid.split("/")[0]) for problem in renamed} == {("mine", "mine")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt = None: must be a list of messages"),
        ({"prompt": []}, "prompt must end with a message of the user"),
        ({"prompt": chat(("user", "u"), ("assistant", "a"))}, "prompt must end with a message of the user"),
        ({"prompt": chat(("tool", "u"))}, "prompt has the role 'tool'; known: system, user, assistant"),
        ({"prompt": chat(("user", ""))}, "content = '': must be text"),
        ({"reward_model": None}, "reward_model = None: must hold a ground_truth"),
        ({"reward_model": {"ground_truth": None}}, "ground_truth = None: must be text"),
        ({"data_source": None}, "data_source = None: must be text"),
    ],
)
def test_a_corrupt_row_of_parquet_is_left_out_and_named(write_parquet, change, message):
    path = write_parquet([dapo_row("one", "1"), dapo_row("two", "2") | change], row_group_size=1)
    result = read_parquet(path)
    assert [problem.ground_truth for problem in result.problems] == ["1"]
    ((place, num_rows, reason),) = result.rejected
    assert (place, num_rows) == ("row 2", 1)
    assert reason.startswith(message)


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_a_parquet_file_damaged_in_the_middle_loses_that_stretch(write_parquet, compression):
    rows = [dapo_row(f"question {i} of many", str(i)) for i in range(40)]
    path = write_parquet(rows, row_group_size=10, write_page_checksum=True, compression=compression)
    damaged = bytearray(path.read_bytes())
    if compression == "none":
        start = damaged.index(b"15 of many")
        damaged[start : start + 2] = b"99"  # it can still be read: only the checksum tells
    else:
        group = pytest.importorskip("pyarrow.parquet").read_metadata(path).row_group(1)
        columns = [group.column(i) for i in range(group.num_columns)]
        (column,) = [column for column in columns if column.path_in_schema.endswith("content")]
        middle = column.dictionary_page_offset + column.total_compressed_size // 2
        damaged[middle : middle + 8] = bytes(byte ^ 0xFF for byte in damaged[middle : middle + 8])
    path.write_bytes(damaged)
    result = read_parquet(path)
    assert [problem.ground_truth for problem in result.problems] == [str(i) for i in [*range(10), *range(20, 40)]]
    assert [problem.uid[-6:] for problem in result.problems][10] == "000021"
    assert (result.num_rejected, result.num_rows) == (10, 40)
    assert result.rejected[0].place == "rows 11 to 20"


def test_questions_from_parquet(write_parquet):
    path = write_parquet([{"problem": "one", "answer": 7}, {"problem": "two", "answer": None}])
    result = read_questions(path, QuestionFields("problem", "answer"), "mine")
    assert [(p.messages, p.ground_truth) for p in result.problems] == [((Message("user", "one"),), "7")]
    assert result.rejected == (
        RejectedRows("row 2", 1, "answer = None: must be text that is not empty, or a finite number"),
    )


def test_a_parquet_file_without_a_column_is_named(write_parquet):
    with pytest.raises(ValueError, match=r"has no column prompt, reward_model, only data_source; rename"):
        read_parquet(write_parquet([{"data_source": "math_dapo"}]))


def test_a_parquet_file_without_rows_is_refused(write_parquet):
    path = write_parquet([dapo_row("one", "1")])
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(ValueError, match="holds no problems"):
        read_parquet(path)


def test_a_damaged_parquet_file_is_named(write_parquet):
    path = write_parquet([dapo_row("one", "1")])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"dapo-math\.parquet: is not parquet, or damaged"):
        read_parquet(path)
