"""The tool on small and on real files: what it writes, what it says, exit statuses."""

import json
from pathlib import Path

import pytest

from fipo_megatron.config.problems import DataConfig, DataFileConfig
from fipo_megatron.data.encoding import instructed, plain_text
from fipo_megatron.data.load import load_files, load_problems
from fipo_megatron.data.sources import SOURCES
from tools import prepare_data

LONG = " ".join(f"word{i}" for i in range(20))


def write(path: Path, *rows: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return path


@pytest.fixture
def files(tmp_path):
    train = write(
        tmp_path / "train.jsonl",
        *[("one", "#### 1"), ("two", "#### 2"), ("two", "#### 3"), ("one", "#### 1"), (f"So: {LONG}", "#### 4")],
        *[("five", "no answer"), ("six", "1 + 5 = 6\n#### 6")],
    )
    test = write(tmp_path / "test.jsonl", (f"{LONG}?", "#### 4"), ("Seven", "#### 7"))
    return train, test, tmp_path / "out"


def run(out: Path, *sources: str) -> int:
    return prepare_data.main([*sources, "--out", str(out)])


def truths(path: Path) -> list[str]:
    return [problem.ground_truth for problem in load_problems(DataFileConfig(path=str(path)), 0).problems]


def test_files_and_report_of_one_call(files, capsys):
    train, test, out = files
    assert run(out, f"gsm8k_train={train}", f"gsm8k_test={test}") == 0
    assert sorted(path.name for path in out.iterdir()) == ["gsm8k_test.parquet", "gsm8k_train.parquet", "report.json"]
    assert truths(out / "gsm8k_train.parquet") == ["1", "6"]
    assert truths(out / "gsm8k_test.parquet") == ["4", "7"]
    report = json.loads((out / "report.json").read_text())["gsm8k_train"]
    assert report["contaminated"] == {"gsm8k_test": 1}
    assert (report["rows_read"], report["rejected"], report["duplicates"], report["conflicting"]) == (7, 1, 1, 2)
    assert report["conflict_examples"] == ["gsm8k_train/train/000002: '2', '3'"]
    printed = capsys.readouterr().out
    assert "1 of 7 rows can't be read: line 6 answer ends in 'no answer'" in printed
    assert "1 gsm8k_test" in printed


def test_a_run_puts_prepared_questions_into_its_own_template(files):
    train, test, out = files
    assert run(out, f"gsm8k_train={train}", f"gsm8k_test={test}") == 0
    data = {"train": str(out / "gsm8k_train.parquet"), "eval": {"gsm8k_test": str(out / "gsm8k_test.parquet")}}
    config = DataConfig.model_validate({**data, "template": "Q: {question} A:"})
    problems = load_files(config)
    texts = [plain_text(instructed(problem, config.template)) for problem in problems.train[0].problems]
    assert texts == ["Q: one A:\n\n", "Q: six A:\n\n"]
    assert [problem.solution for problem in problems.train[0].problems] == [None, "1 + 5 = 6"]
    assert instructed(problems.evaluation["gsm8k_test"].problems[1], config.template)[0].content == "Q: Seven A:"


def test_prepared_files_can_be_prepared_again(files, tmp_path):
    train, test, out = files
    assert run(out, f"gsm8k_train={train}", f"gsm8k_test={test}") == 0
    again = [f"{name}={out / name}.parquet" for name in ("gsm8k_train", "gsm8k_test")]
    assert run(tmp_path / "again", *again) == 0
    for name in ("gsm8k_train", "gsm8k_test"):
        first, second = (
            load_problems(DataFileConfig(path=f"{folder}/{name}.parquet"), 0) for folder in (out, tmp_path / "again")
        )
        assert first.problems == second.problems


def test_sets_of_an_earlier_call_count(files, capsys):
    train, test, out = files
    assert run(out, f"gsm8k_test={test}") == 0
    assert run(out, f"gsm8k_train={train}") == 0
    assert truths(out / "gsm8k_train.parquet") == ["1", "6"]
    assert json.loads((out / "report.json").read_text()).keys() == {"gsm8k_train", "gsm8k_test"}


def test_a_training_set_that_is_compared_with_nothing_says_so(files, capsys):
    train, _, out = files
    assert run(out, f"gsm8k_train={train}") == 0
    assert truths(out / "gsm8k_train.parquet") == ["1", "4", "6"]
    assert "no evaluation set is given" in capsys.readouterr().out


def test_training_sets_that_an_evaluation_set_came_after_are_named(files, capsys):
    train, test, out = files
    assert run(out, f"gsm8k_train={train}") == 0
    assert capsys.readouterr().err == ""
    assert run(out, f"gsm8k_test={test}") == 0
    named = f"prepare_data: {out / 'gsm8k_train.parquet'} was not decontaminated against gsm8k_test; prepare "
    assert capsys.readouterr().err == f"{named}gsm8k_train again\n"
    assert truths(out / "gsm8k_train.parquet") == ["1", "4", "6"]
    assert run(out, f"gsm8k_train={train}") == 0
    assert capsys.readouterr().err == ""
    assert run(out, f"gsm8k_test={test}") == 0
    assert capsys.readouterr().err == ""
    (out / "report.json").unlink()
    assert run(out, f"gsm8k_test={test}") == 0
    assert capsys.readouterr().err == f"{named}gsm8k_train again\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gsm8k", "'gsm8k': no such source; known: dapo_math_17k"),
        ("gsm8k_train=", "no path after `=`"),
        ("gsm8k_train=none.jsonl", "none.jsonl: no such file"),
        ("gsm8k_test={test}", "gsm8k_test is given twice"),
        ("gsm8k_train={bad}", "rows can't be read: line 1"),
    ],
)
def test_unusable_sources_end_with_status_2_and_write_nothing(files, tmp_path, capsys, source, message):
    _, test, out = files
    bad = write(tmp_path / "bad.jsonl", ("q", "none"), ("q", "none"), ("q", "#### 1"))
    assert run(out, f"gsm8k_test={test}", source.format(test=test, bad=bad)) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare_data: ")
    assert message in error
    assert not (out / "gsm8k_train.parquet").exists()


def test_the_help_names_every_source(capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in SOURCES)


def test_real_files(shared_dir, tmp_path):
    data = shared_dir / "data"
    sources = [f"gsm8k_{split}={data}/gsm8k/{split}.jsonl" for split in ("train", "test")]
    assert run(tmp_path, *sources, f"aime_2024={data}/aime24/test.jsonl") == 0
    reports = json.loads((tmp_path / "report.json").read_text())
    for name, rows_read in (("gsm8k_train", 7473), ("gsm8k_test", 1319), ("aime_2024", 30)):
        report = reports[name]
        assert report["rows_read"] == rows_read
        lost = sum(report[key] for key in ("rejected", "duplicates", "conflicting"))
        lost += sum(report["contaminated"].values())
        assert report["written"] == rows_read - lost == len(truths(tmp_path / f"{name}.parquet"))
        assert lost < 0.01 * rows_read
    solved = load_problems(DataFileConfig(path=str(tmp_path / "gsm8k_train.parquet")), 0).problems
    assert all(problem.solution and not problem.has_instruction for problem in solved)
    assert reports["gsm8k_train"]["decontaminated_against"] == ["gsm8k_test", "aime_2024"]
