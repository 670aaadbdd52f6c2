"""Sources by name: copies of their files in every layout, and what is said when one can't be fetched."""

import json

import pytest

from fipo_megatron.data.readers import read_questions
from fipo_megatron.data.sources import SOURCES, download, find_source, read_source, rule_of_set
from fipo_megatron.reward.math_answer import score_dapo


@pytest.fixture
def write(tmp_path):
    def write_rows(suffix: str, rows: list[dict]):
        path = tmp_path / f"copy{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: run make install")
            pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return write_rows


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("name", "row", "truth"),
    [
        ("gsm8k_test", {"question": "q", "answer": "1 + 1 = 2\n#### 1,002"}, "1002"),
        ("aime_2024", {"id": 60, "problem": "p", "answer": "025", "year": "2024"}, "25"),
        ("aime_2025", {"problem_idx": 1, "problem": "p", "answer": 70}, "70"),
        ("hmmt_feb_2025", {"problem_idx": 1, "problem": "p", "answer": r"\frac{1}{576} "}, r"\frac{1}{576}"),
        ("brumo_2025", {"problem_idx": 1, "problem": "p", "answer": "12"}, "12"),
    ],
)
def test_rows_of_questions_and_answers(write, suffix, name, row, truth):
    (problem,) = read_source(find_source(name), write(suffix, [row])).problems
    assert (problem.ground_truth, problem.data_source, problem.has_instruction) == (truth, name, False)


@pytest.mark.parametrize("name", ["dapo_math_17k", "aime_2024"])
def test_a_copy_in_the_layout_of_dapo(write, name):
    chat = [{"role": "user", "content": "Solve it. p"}]
    row = {"data_source": "math_dapo", "prompt": chat, "reward_model": {"ground_truth": "34"}}
    (problem,) = read_source(find_source(name), write(".parquet", [row])).problems
    assert (problem.ground_truth, problem.data_source, problem.has_instruction) == ("34", name, True)


def test_a_layout_that_the_source_does_not_have_is_refused(write):
    with pytest.raises(ValueError, match="dapo_math_17k: .*must be parquet in DAPO's layout"):
        read_source(find_source("dapo_math_17k"), write(".jsonl", [{"question": "q", "answer": "1"}]))
    with pytest.raises(ValueError, match="has no column prompt"):
        read_source(find_source("dapo_math_17k"), write(".parquet", [{"question": "q", "answer": "1"}]))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'aime': no such source; known: dapo_math_17k, gsm8k_train, .*brumo_2025"):
        find_source("aime")


def test_without_network_a_local_file_is_asked_for(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    assert constants.HF_HUB_OFFLINE  # in all tests
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, source in SOURCES.items():
        with pytest.raises(ValueError, match=rf"{name}: can't fetch .*local file: {name}=path/to") as caught:
            download(source)
        assert len(str(caught.value).splitlines()) == 1


def test_answers_that_are_no_plain_numbers_are_not_compared_as_text(write):
    assert [name for name, source in SOURCES.items() if source.rule == "math_verify"] == [
        *("hmmt_feb_2025", "hmmt_feb_2026", "brumo_2025")
    ]
    result = read_source(find_source("hmmt_feb_2025"), write(".jsonl", [{"problem": "p", "answer": r"\frac{1}{576}"}]))
    assert score_dapo("Answer: 1/576", result.problems[0].ground_truth).accuracy == 0  # what must not be measured
    assert rule_of_set("mine", result, "dapo") == "math_verify"
    assert [rule_of_set("mine", result, rule) for rule in ("math_verify", "custom")] == ["math_verify", "custom"]


@pytest.mark.parametrize("known_by", ["set", "file", "data source"])
def test_a_set_is_known_by_its_name_its_file_or_its_problems(write, tmp_path, known_by):
    path = write(".jsonl", [{"problem": "p", "answer": "1"}])
    if known_by == "file":
        path = path.rename(tmp_path / "brumo_2025.jsonl")
    fields = find_source("brumo_2025").fields
    assert fields is not None
    result = read_questions(path, fields, "brumo_2025" if known_by == "data source" else "mine")
    name = "brumo_2025" if known_by == "set" else "mine"
    assert rule_of_set(name, result, "dapo") == "math_verify"
    other = read_questions(write(".jsonl", [{"problem": "p", "answer": "1"}]), fields, "aime_2024")
    assert rule_of_set("mine", other, "dapo") == "dapo"
