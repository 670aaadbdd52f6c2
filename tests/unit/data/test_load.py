"""Files as a configuration names them: how the format is found, and when a file is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fipo_megatron.config.problems import DataConfig, DataFileConfig
from fipo_megatron.data.encoding import instructed
from fipo_megatron.data.load import detect_format, load_evaluation_set, load_files, load_problems
from fipo_megatron.data.prepare import write_problems
from fipo_megatron.data.readers import Message, Problem

GSM8K = {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
AIME = {"id": 60, "problem": "Find it.", "answer": "025"}


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows: object) -> str:
        path = tmp_path / "problems.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write_rows


def load(path: str, max_corrupt_frac: float = 0.5, **fields: object):
    return load_problems(DataFileConfig.model_validate({"path": path, **fields}), max_corrupt_frac)


@pytest.mark.parametrize(
    ("name", "data_source", "count"),
    [("gsm8k/train.jsonl", "gsm8k", 7473), ("gsm8k/test.jsonl", "gsm8k", 1319), ("aime24/test.jsonl", "test", 30)],
)
def test_real_files_are_known_by_their_fields(shared_dir, name, data_source, count):
    problems = load(str(shared_dir / "data" / name)).problems
    assert {problem.data_source for problem in problems} == {data_source}
    assert len(problems) == count


def test_the_first_readable_line_tells_the_format(write):
    assert detect_format(Path(write("not JSON", "[]", GSM8K))) == "gsm8k"
    assert detect_format(Path(write(AIME))) == "aime"
    assert detect_format(Path("somewhere.parquet")) == "parquet"


def test_each_format_gives_its_source_unless_one_is_given(write):
    assert load(write(GSM8K)).problems[0].data_source == "gsm8k"
    assert load(write(AIME)).problems[0].data_source == "problems"
    assert load(write(AIME), data_source="aime_2024").problems[0].uid == "aime_2024/problems/60"
    (problem,) = load(write({"q": "one", "a": 1}), format="jsonl", question="q", answer="a").problems
    assert (problem.uid, problem.ground_truth) == ("problems/problems/000001", "1")


@pytest.mark.parametrize("row", [{"q": 1, "a": 2}, {"question": "q", "answer": "4"}, {"problem": "p", "answer": "4"}])
def test_unknown_fields_are_refused_and_the_remedy_named(write, row):
    with pytest.raises(ValueError, match="are those of no known format; declare its fields, .*format: jsonl"):
        load(write(row))


@pytest.mark.parametrize("rows", [(), ("",), ("text", "1")])
def test_a_file_without_an_object_is_refused(write, rows):
    with pytest.raises(ValueError, match="holds no problems"):
        load(write(*rows))


def test_a_missing_file_is_named(tmp_path):
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(ValueError, match=f"{name}: no such file"):
            load(str(tmp_path / name))


def test_unreadable_rows_up_to_a_share_are_left_out(write):
    path = write(GSM8K, "{", GSM8K, "{")
    assert load(path, 0.5).num_rejected == 2
    with pytest.raises(ValueError, match=r"2 of 4 rows can't be read: line 2 .*raise data.max_corrupt_frac = 0.49"):
        load(path, 0.49)
    with pytest.raises(ValueError, match="can't be read"):
        load(path, 0)


def test_an_evaluation_set_is_whole_or_refused(write):
    assert len(load_evaluation_set(DataFileConfig(path=write(GSM8K, "", GSM8K))).problems) == 2
    file = DataFileConfig(path=write(*[GSM8K] * 99, "{"))
    with pytest.raises(ValueError, match=r"problems.jsonl: 1 of 100 rows can't be read: line 100 .*correct the file"):
        load_evaluation_set(file)
    with pytest.raises(ValueError, match="line 100"):
        load_files(DataConfig(eval={"mine": file}))
    assert len(load_problems(file, 0.5).problems) == 99


@pytest.fixture
def write_questions(tmp_path):
    def write_file(name: str, *questions: str) -> DataFileConfig:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"question": q, "answer": "#### 1"}) + "\n" for q in questions))
        return DataFileConfig(path=str(path), data_source=name)

    return write_file


def test_questions_that_are_trained_and_evaluated_on_are_refused(write_questions):
    a, b = write_questions("a", "One?", "Two?", "Three?"), write_questions("b", "Four?", "Five?")
    mine, other = write_questions("mine", "two? ", "THREE?", "Six?"), write_questions("other", "Four, too?")
    both = DataConfig(train=(a, b), eval={"mine": mine, "other": other})
    with pytest.raises(ValueError, match="share questions") as refused:
        load_files(both)
    assert str(refused.value) == (
        f"data.train and data.eval share questions: 2 both in {a.path} and in {mine.path}; take them out of the "
        "training file: tools/prepare_data.py decontaminates"
    )
    files = load_files(DataConfig(train=(b,), eval={"mine": mine, "other": other}))
    assert ([len(result.problems) for result in files.train], [*files.evaluation]) == ([2], ["mine", "other"])


def test_an_instruction_does_not_hide_a_shared_question(write_questions, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: run make install")
    bare = write_questions("bare", "One?", "Two?", "Three?")
    path = tmp_path / "instructed.parquet"
    problems = load_problems(bare, 0).problems
    template = "Think hard.\n\n{question}"
    write_problems([replace(p, messages=instructed(p, template), has_instruction=True) for p in problems], path)
    with pytest.raises(ValueError, match=r"3 both in .*instructed.parquet and in .*bare.jsonl"):
        load_files(DataConfig(train=(DataFileConfig(path=str(path)),), eval={"mine": bare}))


def test_a_template_into_which_nothing_would_be_put_is_refused(write_questions, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: run make install")
    bare = write_questions("bare", "One?", "Two?")
    path = tmp_path / "instructed.parquet"
    chat = (Message("user", "Think hard. Three?"),)
    write_problems([Problem("u", chat, "3", "x", has_instruction=True)], path)
    instructed_file = DataFileConfig(path=str(path))
    with pytest.raises(ValueError, match=r"data.template = 'Q: \{question\}': has no effect: all rows .*; remove it"):
        load_files(DataConfig(train=(instructed_file,), template="Q: {question}"))
    assert load_files(DataConfig(train=(instructed_file,), eval={"mine": bare}, template="Q: {question}")).train
    assert load_files(DataConfig(train=(instructed_file,))).train
    assert load_files(DataConfig(template="Q: {question}")).train == ()
